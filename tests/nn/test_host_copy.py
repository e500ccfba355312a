"""``nn.host_copy``: what was sent is read, and stays what it was."""

import torch

from jebi.nn.host_copy import HostCopy


def test_what_is_read_is_not_overwritten_by_the_next() -> None:
    copy, values = HostCopy((2, 3), torch.long, torch.device("cpu")), torch.arange(6).view(2, 3)
    copy.send(values)
    first = copy.read()
    copy.send(values + 1)
    assert torch.equal(first, values)
    assert torch.equal(copy.read(), values + 1)


def test_one_number_of_a_larger_buffer() -> None:
    buffer = torch.zeros(5)
    copy = HostCopy((), buffer.dtype, buffer.device)
    buffer[-1].fill_(True)
    copy.send(buffer[-1])
    buffer.zero_()
    assert copy.read().item() == 1
