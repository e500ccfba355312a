"""Trainings of several processes on the CPU, each forked from this one, so that jebi is imported once for all.

    python ranks.py JOBS.json

The file holds a list of jobs, run one after the other. What a process of a job knows afterwards lies in its output
folder: ``rank-N.safetensors`` (its adapter) and ``rank-N.json``. A launcher's environment is all that the processes
have of one; launchers themselves are `tests/ecosystem`'s and `test_launchers`'.
"""

import gc
import json
import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from jebi import FastLanguageModel, SFTConfig, SFTTrainer
from jebi.adapters.peft_files import adapter_tensors
from jebi.config.launched import World
from jebi.errors import JebiError
from jebi.models.shares import join
from jebi.nn.sharding import Codes
from jebi.plan.held import Held
from jebi.plan.inventory import adapter_items
from jebi.training.planning import held_of


class CtrlC(TrainerCallback):
    """Sends this process Ctrl-C as a step begins."""

    def __init__(self, step: int):
        self.step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step + 1 == self.step:
            os.kill(os.getpid(), signal.SIGINT)


class Look(TrainerCallback):
    """Sees what gradients take while they are there."""

    def __init__(self) -> None:
        self.gradients = 0

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        held = [p.grad.untyped_storage() for p in kwargs["model"].parameters() if p.grad is not None]
        self.gradients = sum({storage.data_ptr(): storage.nbytes() for storage in held}.values())


def train(job: dict[str, Any], rank: int) -> dict[str, Any]:
    """One process of a job; what it knows afterwards."""
    args = SFTConfig(**job["settings"])
    uneven = refused_machines(rank) if job.get("differ") else ""
    model, tokenizer = FastLanguageModel.from_pretrained(
        job["model"], 128, torch.float32, device="cpu", **job.get("load", {})
    )
    known: dict[str, Any] = {"bytes": held_bytes(layers_weights(model)), "numbers": model.trainable_parameters()}
    known["uneven"] = uneven
    known["model"] = held_bytes(p for name, p in named_tensors(model) if "rotary" not in name)
    if job.get("load", {}).get("shard"):
        known["divided"] = sorted({str(p.dtype) for p in model.parameters() if isinstance(p, DTensor)})
        known["refused"] = [
            refusal(lambda: FastLanguageModel.get_peft_model(model, use_dora=True)),
            refusal(lambda: FastLanguageModel.get_peft_model(model, init_lora_weights="pissa")),
            refusal(lambda: model.save_base(str(args.output_dir))),
        ]
    if not job.get("load", {}).get("full_finetuning"):
        adapt(model)
    texts = job["rows"][1:] if rank and job.get("differ") else job["rows"]
    rows: Any = Dataset.from_dict({"text": texts})
    if job.get("stream"):
        rows = rows.to_iterable_dataset()
        assert isinstance(rows, IterableDataset)
    looked = Look()
    callbacks = [looked, CtrlC(job["ctrl_c"])] if rank == 1 and "ctrl_c" in job else [looked]
    heldout = Dataset.from_dict({"text": job["heldout"]})
    trainer = SFTTrainer(model, tokenizer, rows, heldout, args=args, callbacks=callbacks)
    try:
        trainer.train(resume_from_checkpoint=job.get("resume"))
    except (KeyboardInterrupt, JebiError) as error:
        known["error"] = f"{type(error).__name__}: {error}"
    known |= {"log": trainer.state.log_history, "step": trainer.state.global_step}
    if trainer.report is not None:
        known["tokens"] = trainer.report.tokens
        known["by_rank"] = [one.tokens for one in trainer.report.ranks]
        known["predicted"] = trainer.report.predicted
        known["predicted_by_rank"] = [one.predicted_gb for one in trainer.report.ranks]
    world = World(job["ranks"], job["ranks"], bool(job.get("load", {}).get("shard")))
    counted = held_of(model, args.optim, world)
    known |= {"counted": counted.parts, "counted gradients": gradient_bytes(counted), "gradients": looked.gradients}
    FastLanguageModel.for_inference(model)
    asked = tokenizer("### a template:\nabc", return_tensors="pt")
    known["answer"] = model.generate(**asked, max_new_tokens=6, do_sample=False)[0].tolist()
    trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    save_file(trained, Path(str(args.output_dir)) / f"rank-{rank}.safetensors")
    return known


def adapt(model: Any) -> None:
    """Put an adapter on it whose B is not zero: the gradient of A would be nothing but rounding else."""
    FastLanguageModel.get_peft_model(model, r=4, lora_alpha=8)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, value in adapter_tensors(model).items():
            if "lora_B" in name:
                value.copy_(0.1 * torch.randn(value.shape, generator=generator))


def refusal(call: Callable[[], object]) -> str:
    """What a call is refused with."""
    try:
        call()
    except JebiError as error:
        return str(error)
    raise AssertionError("not refused")


def refused_machines(rank: int) -> str:
    """What dividing a model is refused with where this machine has another number of processes than the next."""
    here = os.environ["LOCAL_WORLD_SIZE"]
    os.environ["LOCAL_WORLD_SIZE"] = str(1 + rank)
    try:
        return refusal(lambda: join(torch.device("cpu")))
    finally:
        os.environ["LOCAL_WORLD_SIZE"] = here


def layers_weights(model: Any) -> list[torch.Tensor]:
    """The layers' frozen weights, packed ones by their parts; codes that are divided lie elsewhere."""
    weights = [linear.weight for _, linear in model.linears() if linear is not model.lm_head]
    tensors = []
    for weight in weights:
        tensors += [weight] if isinstance(weight, torch.Tensor) else list(weight.buffers())
    return tensors + [module.laid for module in model.modules() if isinstance(module, Codes)]


def named_tensors(model: Any) -> list[tuple[str, torch.Tensor]]:
    """All that a model is made of, each once."""
    return [*model.named_parameters(), *model.named_buffers()]


def held_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """What this process holds of them."""
    parts = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]
    return sum(part.numel() * part.element_size() for part in parts)


def gradient_bytes(held: Held) -> int:
    """What a plan counts for gradients."""
    return sum(item.bytes for item in adapter_items(held) if item.name.startswith("gradients"))


def child(job: dict[str, Any], rank: int, port: int) -> None:
    """A forked process: never returns."""
    ranks = job["ranks"]
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    code = 1
    try:
        known = train(job, rank)
        path = Path(job["settings"]["output_dir"]) / f"rank-{rank}.json"
        path.write_text(json.dumps(known), encoding="utf-8")
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        # Not Python's own way out: that is its parent's.
        os._exit(code)


def main(path: Path) -> None:
    """Run every job; the first that fails ends it."""
    # What every process would do by itself otherwise: half of what a job takes.
    Dataset.from_dict({"text": [""]})
    gc.collect()
    gc.freeze()
    for job in json.loads(path.read_text(encoding="utf-8")):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        pids = []
        for rank in range(job["ranks"]):
            pid = os.fork()
            if pid == 0:
                child(job, rank, port)
            pids.append(pid)
        codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
        assert not any(codes), f"{job['settings']['output_dir']}: {codes}"


if __name__ == "__main__":
    main(Path(sys.argv[1]))
