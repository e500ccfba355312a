"""``models.device``: which card a process takes, and what memory there is."""

import psutil
import pytest
import torch

from jebi import is_bfloat16_supported
from jebi.models import device
from jebi.models.device import default_device, default_dtype, device_of, free_bytes, reserve_in_pages


@pytest.mark.parametrize(
    ("rank", "cards", "expected"),
    [(None, 4, "cuda:0"), ("2", 4, "cuda:2"), ("2", 1, "cuda:0")],
    ids=["one process", "a process a card", "a process that sees its card alone"],
)
def test_every_process_takes_its_own_card(
    rank: str | None, cards: int, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: cards)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("LOCAL_RANK", rank)
    assert default_device() == device_of("cuda") == torch.device(expected)
    assert device_of("cuda:1") == torch.device("cuda:1")
    assert device_of(torch.device("cpu")) == torch.device("cpu")


def test_a_cpu_has_the_hosts_memory() -> None:
    assert 0 < free_bytes(torch.device("cpu")) <= psutil.virtual_memory().total


def test_without_a_card_it_is_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert default_device() == torch.device("cpu")


@pytest.mark.parametrize(("capability", "expected"), [((7, 5), torch.float16), ((8, 0), torch.bfloat16)])
def test_a_card_without_bfloat16_computes_in_float16(
    capability: tuple[int, int], expected: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A T4 is of 7.5; torch says it has bfloat16, which it emulates."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    assert default_dtype(torch.device("cuda")) == expected
    assert is_bfloat16_supported() == (expected == torch.bfloat16)


@pytest.mark.parametrize(
    ("backend", "own", "system", "expected"),
    [
        ("native", "", "6.8.0-generic", ["expandable_segments:True"]),
        ("native", "max_split_size_mb:512", "6.8.0-generic", []),
        ("cudaMallocAsync", "", "6.8.0-generic", []),
        ("native", "", "5.15.167.4-microsoft-standard-WSL2", []),
    ],
)
def test_memory_is_reserved_in_pages_unless_the_caller_has_said_how(
    backend: str, own: str, system: str, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether in the environment or by torch's own calls; and not where a driver fails at it."""
    said: list[str] = []
    monkeypatch.setattr(torch._C, "_accelerator_getAllocatorSettings", lambda: said[-1] if said else own)
    monkeypatch.setattr(torch._C, "_accelerator_setAllocatorSettings", said.append)
    monkeypatch.setattr(torch.cuda, "get_allocator_backend", lambda: backend)
    monkeypatch.setattr(device, "release", lambda: system)
    reserve_in_pages(torch.device("cpu"))
    assert not said
    for _ in range(2):
        reserve_in_pages(torch.device("cuda"))
    assert said == expected


@pytest.mark.parametrize("name", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_where_torch_does_not_tell_its_settings_the_environment_does(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.delattr(torch._C, "_accelerator_getAllocatorSettings", raising=False)
    monkeypatch.setattr(torch._C, "_accelerator_setAllocatorSettings", said.append)
    monkeypatch.setattr(torch.cuda, "get_allocator_backend", lambda: "native")
    monkeypatch.setattr(device, "release", lambda: "6.8.0-generic")
    monkeypatch.setenv(name, "max_split_size_mb:512")
    reserve_in_pages(torch.device("cuda"))
    assert not said
    monkeypatch.delenv(name)
    reserve_in_pages(torch.device("cuda"))
    assert said == ["expandable_segments:True"]
