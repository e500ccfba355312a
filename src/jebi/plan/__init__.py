"""What a run will hold and how it is cut, from sizes alone. Nothing is measured or allocated here."""
