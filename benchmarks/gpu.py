"""The trainer on one GPU, unattended: speed, memory beside the plan, and the paths that only a GPU has. One JSON.

`python benchmarks/gpu.py --out gpu.json` takes some ten minutes on an 80 GB card. It needs this checkout, torch,
transformers, peft and accelerate (and bitsandbytes for QLoRA). The little else that the trainer imports can be carried
to a machine where nothing can be installed: `python benchmarks/gpu.py --bundle DIR --python 3.12` puts all of it
there, and `python DIR/benchmarks/gpu.py` runs. `--tiny` is a tiny model, on the CPU too: to see that the script runs.

The model is a Llama-3-8B of random weights (speed and memory do not depend on their values), built by the trainer's
own `load_model`; only where the weights come from is replaced. Each case is a process: lack of memory in one leaves
the others alone.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
CARRIED = ("pydantic", "pydantic-core", "annotated-types", "typing-inspection", "typing-extensions")
"""What the trainer imports besides torch, transformers, peft and accelerate and what these bring with them."""
LLAMA_3_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": False,
}
TINY = LLAMA_3_8B | {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
}
TOKENS, DOCUMENTS = 4096, 8
RANK = 16
AIMS = {"of the dense peak": 0.46, "of the measured product": 0.55, "of the plan's memory": 0.10}
CASE_SECONDS = 420

Figures = dict[str, Any]


def speed_cases() -> Iterator[Figures]:
    """What is measured: LoRA with and without compilation and recomputation, QLoRA."""
    for compiled in (False, True):
        for checkpointing in (False, True):
            yield {"kind": "speed", "method": "lora", "compile": compiled, "checkpointing": checkpointing}
    for checkpointing in (False, True):
        yield {"kind": "speed", "method": "qlora", "compile": False, "checkpointing": checkpointing}


# --- one speed case --------------------------------------------------------------------------------------------------


def device() -> Any:
    """The GPU, or the CPU where there is none."""
    import torch

    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def precision() -> Any:
    """The type that the model computes in."""
    import torch

    return torch.bfloat16 if torch.cuda.is_available() else torch.float32


def synchronise() -> None:
    """Wait for the GPU."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def config_directory(folder: Path, config: Figures) -> Path:
    """A directory with a model's config.json and nothing else."""
    content = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "bos_token_id": 1, "eos_token_id": 2}
    (folder / "config.json").write_text(json.dumps(content | config))
    return folder


def random_model(folder: Path, config: Figures, case: Figures, mesh: Any = None) -> Any:
    """`load_model` with random weights in the place of files."""
    import torch

    from finetune_api.spec import Tuning
    from finetune_trainer.model import build, nf4

    tuning = Tuning.model_validate({"method": case["method"], "lora": {"rank": RANK}})
    build.SafetensorsDirectory = lambda source: contextlib.nullcontext()  # type: ignore[assignment, misc]
    build.ModelWeights = lambda files, base: None  # type: ignore[assignment, misc]
    nf4.read_states = lambda base, files, on: None  # _fill makes them

    def fill(base: Any, weights: Any) -> None:
        torch.manual_seed(0)
        for parameter in base.parameters():
            if parameter.is_floating_point():
                local = parameter.to_local() if hasattr(parameter, "to_local") else parameter
                torch.nn.init.normal_(local.data, std=0.02)
        if tuning.method.traits.four_bit:
            quantise(base, tuning)

    build._fill = fill
    return build.load_model(
        directory=config_directory(folder, config),
        method=tuning.method,
        tuning=tuning,
        precision=precision(),
        device=device(),
        mesh=mesh,
        seed=1,
        activation_checkpointing=case["checkpointing"],
        compile=case["compile"],
        nf4_directory=folder,
    )


def quantise(base: Any, tuning: Any) -> None:
    """Random 4-bit weights with their constants, tensor by tensor."""
    import torch
    from bitsandbytes.functional import QuantState

    from finetune_trainer.model import nf4

    for module in nf4.linear_4bit(base).values():
        weight = torch.randn(module.out_features, module.in_features, device=device(), dtype=precision())
        packed = nf4.quantize(weight, tuning.quantization)
        state = {key.removeprefix("."): value for key, value in packed.items() if key}
        module.quant_state = QuantState.from_dict(state, device=device())
        module.weight.data.copy_(packed[""].to(device()).view_as(module.weight))


def batch_of(folder: Path, tokens: int, vocabulary: int) -> Any:
    """One packed row of equal documents whose tokens are all labelled, as the trainer's batcher makes it."""
    import numpy as np

    from finetune_trainer.data.documents import DocumentStore, DocumentWriter
    from finetune_trainer.train.batches import MicroBatcher

    length = tokens // DOCUMENTS
    random = np.random.default_rng(0)
    with DocumentWriter(folder / "documents") as writer:
        for _ in range(DOCUMENTS):
            ids = random.integers(3, vocabulary, length)
            writer.add(ids, np.arange(length - 1), ids[1:])
    batcher = MicroBatcher(
        store=DocumentStore(folder / "documents"),
        loss_weights=np.ones(1),
        reduction="token",
        micro_batch_tokens=tokens,
        pad_id=0,
        multiple=8,
    )
    [batch] = batcher.batches(batcher.assign_rows(np.arange(DOCUMENTS)))
    return batch.to(device())


def planned_bytes(config: Figures, case: Figures, tokens: int) -> int:
    """What `finetune plan` says for this run."""
    import torch

    from finetune_api.spec import Tuning
    from finetune_operator.sizing.memory import Memory, Run
    from finetune_operator.sizing.model_shapes import model_facts, shape_of

    cuda = torch.cuda.is_available()
    run = Run(
        tuning=Tuning.model_validate({"method": case["method"], "lora": {"rank": RANK}}),
        compute_bytes=2 if cuda else 4,
        cuda=cuda,
        checkpointing=case["checkpointing"],
        compiled=case["compile"],
        longest=tokens // DOCUMENTS,
    )
    shape = shape_of(model_facts({"architectures": ["LlamaForCausalLM"], **config}))
    return Memory(shape, run).total(tokens)


def used_bytes(before: int) -> int:
    """The most that the process took of the GPU, with its context; on a CPU the resident peak."""
    import torch

    if not torch.cuda.is_available():
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024
    outside = before - torch.cuda.mem_get_info()[0] - torch.cuda.memory_reserved()
    return outside + torch.cuda.max_memory_reserved()


def speed(case: Figures, config: Figures, tokens: int, steps: int) -> Figures:
    """Steps of forward, backward and update."""
    import torch
    from benchmarks.flops import flops_of
    from benchmarks.harness import matmul_flops

    from finetune_operator.sizing.gpus import find_gpu
    from finetune_trainer.train.optimizer import Optimizer

    free = torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        begun = time.perf_counter()
        model = random_model(folder, config, case)
        optimizer = Optimizer(dict(model.trainable))
        batch = batch_of(folder, tokens, config["vocab_size"])
        synchronise()
        built = time.perf_counter() - begun
        flops = flops_of(folder, RANK)

    def step() -> float:
        began = time.perf_counter()
        loss = (model(batch) * batch.target_weight).sum()
        loss.backward()
        optimizer.step(1e-4, optimizer.squared_norm())
        optimizer.zero_grad()
        synchronise()
        return time.perf_counter() - began

    warm = [step() for _ in range(3)]
    seconds = [step() for _ in range(steps)]
    used, planned = used_bytes(free), planned_bytes(config, case, tokens)
    allocated = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
    length = tokens // DOCUMENTS
    needed = flops.of_step(tokens, DOCUMENTS * length**2, tokens - DOCUMENTS)
    rate = needed / sorted(seconds)[len(seconds) // 2]
    limit = matmul_flops(precision(), 8192 if torch.cuda.is_available() else 512, device=device())
    gpu = find_gpu(torch.cuda.get_device_name()) if torch.cuda.is_available() else None
    return {
        "buildSeconds": built,
        "warmUpSeconds": warm,
        "seconds": seconds,
        "tokensPerSecond": tokens / sorted(seconds)[len(seconds) // 2],
        "flopsPerSecond": rate,
        "matmulFlops": limit,
        "ofTheMeasuredProduct": rate / limit,
        "ofTheDensePeak": rate / gpu.flops if gpu else None,
        "choices": {name: choice.value for name, choice in model.choices.items()},
        "peakBytes": used,
        "peakAllocatedBytes": allocated,
        "plannedBytes": planned,
        "peakOfPlan": used / planned,
    }


# --- what only a GPU has ---------------------------------------------------------------------------------------------


def path_one_rank_of_nccl(folder: Path, config: Figures) -> str:
    """FSDP over a mesh of one rank gives the losses of no FSDP, over NCCL."""
    import torch
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    case = {"method": "lora", "compile": False, "checkpointing": False}
    batch = batch_of(folder, 512, config["vocab_size"])
    plain = float(random_model(folder, config, case)(batch).sum().detach())
    model = random_model(folder, config, case, init_device_mesh(device().type, (1,)))
    losses = model(batch)
    losses.sum().backward()
    numbers = torch.ones(3, dtype=torch.float64, device=device())
    dist.all_reduce(numbers)
    sharded = float(losses.sum().detach())
    if abs(plain - sharded) > 1e-2 * abs(plain) or float(numbers.sum()) != 3.0:
        raise AssertionError(f"the loss is {sharded} sharded and {plain} alone")
    return f"backend {dist.get_backend()}, losses {plain:.3f} and {sharded:.3f}"


def path_fused_optimizer(folder: Path, config: Figures) -> str:
    """The fused kernel clips, and skips an update whose norm is not finite."""
    import torch

    from finetune_trainer.train.optimizer import Optimizer

    parameter = torch.nn.Parameter(torch.ones(1000, device=device()))
    optimizer = Optimizer({"weight": parameter})
    parameter.grad = torch.full_like(parameter, 3.0)
    optimizer.step(0.1, torch.tensor(float("inf"), dtype=torch.float64, device=device()))
    if not torch.equal(parameter.detach().cpu(), torch.ones(1000)):
        raise AssertionError("an update with an infinite norm was carried out")
    optimizer.step(0.1, optimizer.squared_norm())
    if not 0.89 < float(parameter.detach().mean()) < 0.91:
        raise AssertionError(f"the first update of AdamW moved a weight to {float(parameter.detach().mean())}")
    return "skipped and updated as it should"


def path_attention_kernels(folder: Path, config: Figures) -> str:
    """Variable-length attention gives what document by document does, forward and backward."""
    import torch

    from finetune_trainer.model.attention import document_attention, varlen_attention
    from finetune_trainer.model.shared_prefix import Layout

    if not torch.cuda.is_available():
        raise NotImplementedError("variable-length attention needs CUDA")
    bounds = torch.tensor([0, 100, 228, 512], dtype=torch.int32, device=device())
    shapes = ((1, 32, 512, 128), (1, 8, 512, 128), (1, 8, 512, 128))
    inputs = [torch.randn(s, device=device(), dtype=torch.bfloat16, requires_grad=True) for s in shapes]
    outcomes = []
    for attend, how in (
        (document_attention, {"row_layout": Layout.of(bounds.tolist(), ())}),
        (varlen_attention, {"cu_seq_lens_q": bounds, "max_length_q": 284}),
    ):
        output, _ = attend(torch.nn.Identity(), *inputs, None, **how)
        outcomes.append([output, *torch.autograd.grad(output.float().square().sum(), inputs)])
    apart = max(float((a - b).norm() / a.norm()) for a, b in zip(*outcomes, strict=True))
    if apart > 0.02:
        raise AssertionError(f"outputs or gradients differ by {apart:.3f} of their norm")
    return f"outputs and gradients differ by at most {apart:.4f} of their norm"


def path_shared_prefixes(folder: Path, config: Figures) -> str:
    """The kernel for shared prefixes gives what masks give, forward and backward."""
    import torch

    from finetune_trainer.model.shared_prefix import kernel_deviation

    deviation = kernel_deviation(128, torch.bfloat16, device())
    if not deviation < 0.02:
        raise AssertionError(f"outputs or gradients are off by {deviation:.3f} of their norm")
    return f"outputs and gradients are off by at most {deviation:.4f} of their norm"


def path_checkpoint_from_the_device(folder: Path, config: Figures) -> str:
    """An asynchronous save holds the values of its moment, whatever is written to the tensors while it goes on."""
    import torch
    import torch.distributed as dist

    from finetune_trainer.train.checkpoint import Checkpoints
    from finetune_trainer.train.state import TrainState

    group = dist.new_group(backend="gloo")
    directory = folder / "checkpoints"
    directory.mkdir()
    assert isinstance(group, dist.ProcessGroup)
    checkpoints = Checkpoints(directory, group, keep=1, attempt="a", identity={}, check_fence=lambda: None)
    tensors = {f"model.{i}": torch.full((1 << 20,), float(i), device=device()) for i in range(32)}
    begun = time.perf_counter()
    checkpoints.save(tensors, TrainState(step=1))
    held = time.perf_counter() - begun
    for tensor in tensors.values():
        tensor.fill_(-1.0)
    checkpoints.wait()
    found = checkpoints.newest()
    assert found is not None
    checkpoints.restore(found, tensors)
    if any(float((tensor - i).abs().max()) for i, tensor in enumerate(tensors.values())):
        raise AssertionError("the checkpoint holds what was written after the save began")
    return f"134 MB: held {held:.3f} s, published after {time.perf_counter() - begun:.3f} s"


def path_out_of_memory(folder: Path, config: Figures) -> str:
    """Lack of GPU memory is known by its class."""
    import torch

    from finetune_trainer.failures import classify

    if not torch.cuda.is_available():
        raise NotImplementedError("running out of GPU memory needs a GPU")
    try:
        torch.empty(1 << 50, dtype=torch.uint8, device=device())
    except Exception as error:
        failure = classify(error, 0)
        if failure.failure_class.value != "cuda-oom":
            raise AssertionError(f"{type(error).__name__} was classed as {failure.failure_class}") from error
        return failure.sentence
    raise AssertionError("a petabyte was allocated")


PATHS: dict[str, Callable[[Path, Figures], str]] = {
    "one rank of NCCL": path_one_rank_of_nccl,
    "fused AdamW": path_fused_optimizer,
    "variable-length attention": path_attention_kernels,
    "shared prefixes": path_shared_prefixes,
    "asynchronous checkpoint": path_checkpoint_from_the_device,
    "lack of memory": path_out_of_memory,
}


def paths(config: Figures) -> Figures:
    """Each path: ok with what was seen, not run with why, or failed with the error."""
    import torch.distributed as dist

    from finetune_trainer.train import processes

    processes.init_distributed(device(), 0, 1, 300)
    found: Figures = {}
    for name, check in PATHS.items():
        with tempfile.TemporaryDirectory() as folder:
            try:
                found[name] = {"outcome": "ok", "seen": check(Path(folder), config)}
            except NotImplementedError as error:
                found[name] = {"outcome": "not run", "why": str(error)}
            except Exception as error:  # the others are still to be seen
                found[name] = {"outcome": "failed", "why": f"{type(error).__name__}: {error}"[:2000]}
    dist.destroy_process_group()
    return found


# --- all cases, unattended -------------------------------------------------------------------------------------------


def one_case(case: Figures, tiny: bool) -> Figures:
    """One case in this process."""
    config = TINY if tiny else LLAMA_3_8B
    if case["kind"] == "paths":
        return paths(TINY)
    return speed(case, config, 256 if tiny else TOKENS, 2 if tiny else 10)


def outcome_of(case: Figures, tiny: bool) -> Figures:
    """One case in a process of its own; a tiny one in this process."""
    if tiny:
        return {"outcome": "ok", **one_case(case, tiny)}
    command = [sys.executable, str(Path(__file__).resolve()), "--case", json.dumps(case)]
    begun = time.perf_counter()
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=CASE_SECONDS)
    except subprocess.TimeoutExpired:
        return {"outcome": "failed", "why": f"it took more than {CASE_SECONDS} s"}
    seconds = time.perf_counter() - begun
    if done.returncode:
        return {"outcome": "failed", "why": done.stderr[-2000:], "caseSeconds": seconds}
    return {"outcome": "ok", **json.loads(done.stdout.splitlines()[-1]), "caseSeconds": seconds}


def about() -> Figures:
    """Device, driver and versions."""
    import importlib.metadata

    import torch

    packages = ("torch", "transformers", "peft", "accelerate", "bitsandbytes", "flash-attn")
    found: Figures = {"python": platform.python_version(), "versions": {}, "device": str(device())}
    for name in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found["versions"][name] = importlib.metadata.version(name)
    if torch.cuda.is_available():
        found |= {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
        found["memoryBytes"] = torch.cuda.mem_get_info()[1]
    return found


def run_all(out: Path, tiny: bool) -> Figures:
    """Every case; the file is written again after each, so that what was seen is never lost."""
    result: Figures = {"date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "tiny": tiny, "aims": AIMS}
    result |= {**about(), "cases": []}
    for case in [{"kind": "paths"}, *speed_cases()]:
        if case.get("method") == "qlora" and "bitsandbytes" not in result["versions"]:
            found: Figures = {"outcome": "not run", "why": "bitsandbytes is not installed"}
        elif tiny and (case.get("compile") or case.get("checkpointing")):
            found = {"outcome": "not run", "why": "one case of each method is enough at tiny size"}
        else:
            found = outcome_of(case, tiny)
        result["cases"].append({"case": case, **found})
        print(json.dumps(result["cases"][-1]), flush=True)
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(result, indent=1) + "\n")
    return result


def copy_sources(folder: Path) -> None:
    """The part of the checkout that the script needs."""
    leave = shutil.ignore_patterns("__pycache__", "results")
    for part in ("operator", "trainer", "benchmarks"):
        shutil.copytree(ROOT / part, folder / part, ignore=leave, dirs_exist_ok=True)


def bundle(folder: Path, python: str) -> None:
    """Everything that the script needs, besides torch and its friends, for a machine where nothing can be installed."""
    copy_sources(folder)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-compile"]
    pip += ["--only-binary=:all:", "--upgrade"]
    target = ["--python-version", python, "--target", str(folder / "site")]
    subprocess.run([*pip, *target, *(f"{name}=={version}" for name, version in carried().items())], check=True)


def carried() -> dict[str, str]:
    """Versions of the packages that are carried: those of this environment."""
    import importlib.metadata

    return {name: importlib.metadata.version(name) for name in CARRIED}


def find_the_trainer() -> None:
    """Put this checkout before everything else, and what was carried after everything else."""
    here = str(Path(__file__).resolve().parent)
    sys.path[:] = [path for path in sys.path if path != here]  # its modules' names are too general
    sys.path[:0] = [str(ROOT), str(ROOT / "operator"), str(ROOT / "trainer")]
    sys.path.append(str(ROOT / "site"))


def main() -> int:
    """Run everything, one case, or make a bundle."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "gpu.json")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--case", help="a case as JSON, in this process")
    parser.add_argument("--bundle", type=Path, metavar="DIR")
    parser.add_argument("--python", default="3.12", help="version of the machine that the bundle is for")
    given = parser.parse_args()
    if given.bundle:
        bundle(given.bundle, given.python)
        return 0
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    find_the_trainer()
    if given.case:
        print(json.dumps(one_case(json.loads(given.case), tiny=False)))
        return 0
    result = run_all(given.out, given.tiny)
    failed = [case for case in result["cases"] if case["outcome"] == "failed"]
    failed += [
        path for path in result["cases"][0].values() if isinstance(path, dict) and path.get("outcome") == "failed"
    ]
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
