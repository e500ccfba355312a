"""``kernels.gpu.launch``: a thread launches kernels, or compiles them alone; and none goes another way."""

import re
import threading
from pathlib import Path
from unittest.mock import MagicMock

import jebi.kernels.gpu
from jebi.kernels.gpu.launch import compiling, launch


def test_a_kernel_is_launched_over_its_grid() -> None:
    kernel = MagicMock()
    launch(kernel, (2, 3), 4, 5, SIZE=6)
    kernel.__getitem__.assert_called_once_with((2, 3))
    kernel.__getitem__.return_value.assert_called_once_with(4, 5, SIZE=6)
    kernel.warmup.assert_not_called()


def test_within_compiling_it_is_compiled_by_this_thread_alone() -> None:
    here, elsewhere = MagicMock(), MagicMock()
    with compiling():
        launch(here, (2,), 4, SIZE=6)
        thread = threading.Thread(target=launch, args=(elsewhere, (2,)))
        thread.start()
        thread.join()
    here.warmup.assert_called_once_with(4, grid=(2,), SIZE=6)
    here.__getitem__.assert_not_called()
    elsewhere.warmup.assert_not_called()
    launch(here, (2,))
    here.__getitem__.assert_called_once_with((2,))


def test_every_kernel_is_launched_so() -> None:
    files = sorted((Path(jebi.kernels.gpu.__file__).parent).glob("*.py"))
    texts = {file.name: file.read_text(encoding="utf-8") for file in files}
    kernels = sum(len(re.findall(r"launch\(\s*_\w+,", text)) for text in texts.values())
    assert kernels >= 15
    for name, text in texts.items():
        assert not re.search(r"\b_\w+\[[^]\n]*\]\(", text), name
