"""From files to passes: sources, templates, token rows, and how rows share a pass."""
