"""A checkpoint's bytes into the system's file cache, while Python still imports what will load them.

The imports take seconds in which the disk idles, and a disk takes seconds for a large checkpoint. What is read is
forgotten here. Nothing heavy is imported, and nothing is an error: the loader says what is wrong.
"""

import threading
from pathlib import Path

_STEP = 2**22


def begin(model_name: str) -> threading.Thread | None:
    """Start to read the weight files of a folder, a .gguf file, or a hub id that was downloaded before.

    Stops at half of the memory that is free, since what is read beyond it drives out what was read first. The thread
    returned ends with the process; None where nothing is to be read.
    """
    files = weight_files(model_name)
    if not files:
        return None
    import psutil

    room = psutil.virtual_memory().available // 2
    thread = threading.Thread(target=_read, args=(files, room), name="jebi-readahead", daemon=True)
    thread.start()
    return thread


def weight_files(model_name: str) -> list[Path]:
    """The files in the order in which they will be loaded."""
    path = Path(model_name).expanduser()
    if path.suffix == ".gguf":
        return [path] if path.is_file() else []
    if not path.is_dir() and model_name.count("/") == 1:
        from huggingface_hub import try_to_load_from_cache
        from huggingface_hub.errors import HFValidationError

        try:
            held = try_to_load_from_cache(model_name, "config.json")
        except HFValidationError:
            return []
        if not isinstance(held, str):
            return []
        path = Path(held).parent
    return sorted(path.glob("*.safetensors"))


def _read(files: list[Path], room: int) -> int:
    """Read up to about ``room`` bytes; how many there were."""
    buffer, done = bytearray(_STEP), 0
    for file in files:
        try:
            with file.open("rb", buffering=0) as stream:
                while done < room and (count := stream.readinto(buffer)):
                    done += count
        except OSError:
            break
    return done
