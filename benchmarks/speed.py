"""Times a training step, an edit and a solve, and compares them with a plain implementation and the machine's limit.

    python benchmarks/speed.py
    python benchmarks/speed.py --sections step memory --threads 1
    python benchmarks/speed.py --model random-llama-3-8b --dtypes bfloat16 --sections step memory edit

`benchmarks/reference.py` is the plain implementation, called the reference. Both get the same batches and weights, and
their results are compared. They run in turn, `--repeats` times in one process, and the medians are reported. The floor
(`benchmarks/floor.py`) is the time that all necessary operations of a step would take at the measured speed of matrix
products.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import gymnasium as gym
import torch
import tyro
from floor import Floor, matmul_rate, pass_rate
from reference import Reference, Scored
from shapes import SHAPES, random_model
from torch import Tensor
from tqdm import tqdm

import rledit_env.own_agents  # noqa: F401 - checks that `agents` is this package
from agents import Hypernetwork, HypernetworkConfig
from agents.rledit.credit import CreditAccumulator
from rledit_env.files import write_text
from rledit_env.lm.editable import EditableLM
from rledit_env.lm.loading.placement import resolve_device
from rledit_env.reporting import text_table, versions
from rledit_env.reward import RewardConfig, backtracked
from rledit_env.scoring import ScoredBatch

EDIT_MODULES = ("model.layers.[20-27].mlp.{gate,up}_proj",)  # of the default model
GRAPH_BYTES = 2**24  # memory bound for the graph of the network's second forward pass, if it runs again
ONCE = "over theirs, equal beginnings once"  # the ratio to the second floor with shared prefixes counted once
Section = Literal["step", "edit", "solve", "memory", "growth"]
Precision = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class Args:
    """Compares the speed of the package with that of a plain implementation."""

    model: str = "smollm2-135m"
    """Registry name, hub id or folder of the model, or a shape of benchmarks/shapes.py, for random weights."""
    edit_modules: tuple[str, ...] = ()
    """Modules to edit; by default gate and up of layers 20 to 27, or for a shape those that the paper edits."""
    tokenizer: str = "smollm2-135m"
    """The model whose tokenizer is used for random weights."""
    dtypes: tuple[Precision, ...] = ("float32", "bfloat16")
    """Precisions of the frozen weights in which the package is measured; the reference runs in the first."""
    data: str = "bundled"
    """CounterFact facts: a file, a folder, a hub id or "bundled"."""
    batch_size: int = 20
    """n, facts in a batch of the training step."""
    edit_batch_size: int = 100
    """Facts in a batch of the editing phase."""
    depth: int = 10
    """k, earlier batches in the reward."""
    samples: int = 2
    """Number of earlier batches in the reward if they are sampled."""
    rank: int = 1024
    """Inner width of the network's blocks."""
    blocks: int = 4
    """Residual blocks of the network."""
    reference_solve: Literal["float32", "float64"] = "float32"
    """Precision of the reference's normal equations; with wide modules a comparison needs float64."""
    repeats: int = 3
    """Number of runs of each measurement; the median is reported."""
    solve_widths: tuple[int, ...] = (4096, 14336)
    """Values of d_in in the "solve" section."""
    growth_edits: int = 5000
    """Edits in the stream of the "growth" section."""
    growth_batch_sizes: tuple[int, ...] = (5, 10, 20, 40)
    """Values of n in the "growth" section."""
    growth_depths: tuple[int, ...] = (0, 2, 5, 10)
    """Values of k in the "growth" section."""
    threads: int = 2
    """Number of torch's threads."""
    tokens_per_pass: int = 0
    """Maximum number of padded tokens in a forward pass with gradients; 0 means the package's default."""
    device: str = "auto"
    """Device of the model; "auto" takes an accelerator if there is one."""
    sections: tuple[Section, ...] = ("step", "edit", "solve", "memory", "growth")
    """Sections to measure."""
    out: Path = Path("runs/speed")
    """Folder for speed.json and growth.png."""
    peak_of: Literal["", "reference", "package"] = ""
    """Only print the bytes in use before a step of this implementation and the peak above them, for "memory"."""


class Stepper:
    """Runs the package's training steps: state, action, transition, reward, gradient of the network."""

    def __init__(self, args: Args, lm: EditableLM, config: RewardConfig | str, batches: int, batch_size: int) -> None:
        self.lm, self.batch_size = lm, batch_size
        self.env = gym.make(
            "RLEdit-CounterFact-v0", model=lm, data=args.data, num_batches=batches, batch_size=batch_size,
            reward=config, reward_gradient=config != "none", array_backend="torch", disable_env_checker=True,
        )  # fmt: skip
        self.inner: Any = self.env.unwrapped
        self.network = make_network(args, lm)
        self.steps = 0
        self.observation, _ = self.env.reset(seed=0)
        self.info: dict[str, Any] = {}
        self.loss = 0.0
        self.factors: tuple[Mapping[str, Tensor], ...] = ({}, {})
        self.keeps_gradient = False  # whether to copy the reward's gradient of the last step, for comparisons
        self.weight_gradient: dict[str, Tensor] = {}
        self.keeps_graph = lm.dtype == torch.bfloat16  # in float32 the network runs a second time, to save memory

    def edit(self, keep_graph: bool = False) -> None:
        """Take one step: action, transition, reward and the next state; ``keep_graph`` keeps the network's graph."""
        self.info = {}  # frees the gradient of the last step before the next
        self.record = self.network.observe(self.observation["keys"], self.observation["value_gradients"])
        with torch.set_grad_enabled(keep_graph):
            factors = self.network.factors(self.record)
        self.graph_factors = factors if keep_graph else None
        keys, values = self.factors = tuple({m: f.detach() for m, f in part.items()} for part in factors)
        self.observation, reward, *_, self.info = self.env.step({"keys": keys, "values": values})
        self.loss = -float(reward)
        self.steps += 1

    def edit_quickly(self, steps: int) -> None:
        """Take steps of :meth:`edit` that score only the current batch, so that all passages have been seen."""
        config = self.inner.reward_config
        self.inner.reward_config = replace(config, backtracking_depth=0) if config is not None else None
        for _ in range(steps):
            self.edit()
        self.inner.reward_config = config

    def learn(self) -> list[Tensor]:
        """Take one step of :meth:`edit`; return the gradient of its reward for the network's parameters."""
        self.edit(self.keeps_graph)
        keys, values = self.factors
        credit = CreditAccumulator("trajectory", key_gradients=True)
        gradient = self.info.pop("reward_gradient")
        if self.keeps_gradient:
            self.weight_gradient = {m: g.clone() for m, g in gradient.items()}
        credit.take(keys, values, gradient, self.info["action_gradient"], 1.0)
        del gradient
        ((key_gradients, value_gradients),) = credit.finish()
        self.network.zero_grad()
        record = replace(self.record, factors=self.graph_factors)
        self.network.accumulate(record, key_gradients, value_gradients, GRAPH_BYTES)
        return [p.grad for p in self.network.parameters() if p.grad is not None]

    @property
    def edits(self) -> Sequence[Any]:
        """The edit passages of the current batch."""
        return [record.edit for record in self.inner.episode.records(self.steps)]

    def batches(self, config: RewardConfig) -> list[ScoredBatch]:
        """The batches that are scored in the exact reward of the current step."""
        earlier = backtracked(self.steps, config, self.inner.np_random)
        return [self.inner.episode.scored(self.steps - i, w) for i, w in {0: 1.0, **earlier}.items()]


def make_network(args: Args, lm: EditableLM) -> Hypernetwork:
    """The paper's policy with random blocks, not the identity; in bfloat16 for a bfloat16 LLM, else in float32."""
    precision: Any = "bfloat16" if lm.dtype == torch.bfloat16 else "float32"
    config = HypernetworkConfig(args.rank, args.blocks, "least_squares", step_size=1e-3, precision=precision)
    network = Hypernetwork(lm.module_shapes, config).to(lm.device)
    generator = torch.Generator(device=lm.device).manual_seed(0)
    with torch.no_grad():
        for parameter in network.networks.parameters():
            if not parameter.any():
                parameter.normal_(std=1e-2, generator=generator)
    network.reset()
    return network


def timed(device: torch.device, work: Callable[[], Any]) -> tuple[float, Any]:
    """The seconds that ``work`` takes, with the device synchronised before and after, and its result."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    result = work()
    wait()
    return time.perf_counter() - start, result


class Benchmark:
    """The sections of the benchmark. Each is a method that returns its numbers for speed.json."""

    def __init__(self, args: Args) -> None:
        self.args = args
        self.seconds: dict[str, list[float]] = {}

    def load(self, precision: Precision, optimize: bool = True) -> EditableLM:
        """Load a separate model, so that the measurements share no caches."""
        args, dtype = self.args, getattr(torch, precision)
        if args.model in SHAPES:
            device = resolve_device(args.device)
            lm = random_model(args.model, args.tokenizer, dtype, device, args.edit_modules, optimize)
        else:
            modules = args.edit_modules or EDIT_MODULES
            lm = EditableLM.load(args.model, modules, dtype, args.device, optimize=optimize)
        lm.max_tokens_per_pass = args.tokens_per_pass or lm.max_tokens_per_pass
        return lm

    def reference(self, lm: EditableLM | None = None) -> Reference:
        """The plain implementation, with a separate model unless ``lm`` is given."""
        lm = lm or self.load(self.args.dtypes[0], optimize=False)
        return Reference(lm, solve_in=getattr(torch, self.args.reference_solve))

    def clock(self, name: str, lm: EditableLM, work: Callable[[], Any]) -> Any:
        """Run ``work``, record its time under ``name``, and return its result."""
        seconds, result = timed(lm.device, work)
        self.seconds.setdefault(name, []).append(seconds)
        print(f"  {name}: {seconds:.3f} s", flush=True)
        return result

    def median(self, name: str) -> float:
        """The median time of the runs under ``name``."""
        return statistics.median(self.seconds[name])

    def step(self) -> dict[str, Any]:
        """Compare a training step with ``depth`` earlier batches with the reference and the floor."""
        args = self.args
        exact = RewardConfig(backtracking_depth=args.depth, regularisation=0.0)
        sampled = replace(exact, backtracking_samples=args.samples)
        batches = args.depth + args.repeats + 1
        steppers = {
            f"{name}, {reward}": Stepper(args, self.load(name), config, batches, args.batch_size)
            for name in args.dtypes
            for reward, config in (("exact", exact), (f"{args.samples} of {args.depth} sampled", sampled))
        }
        for stepper in tqdm(steppers.values(), desc="first batches"):
            stepper.edit_quickly(args.depth)
        compared = steppers[f"{args.dtypes[0]}, exact"]
        compared.keeps_gradient = True
        reference = self.reference()
        deviations: dict[str, list[float]] = {}
        floors: dict[str, list[dict[str, float]]] = {name: [] for name in steppers}
        floors_once: dict[str, list[float]] = {name: [] for name in steppers}
        for _ in range(args.repeats):
            for name, stepper in steppers.items():
                floors[name].append(self._floor(stepper, exact, "sampled" in name))
                floors_once[name].append(sum(self._floor(stepper, exact, "sampled" in name, once=True).values()))
            scored, edits = compared.batches(exact), compared.edits
            moments = compared.network.memory_state()
            reference.lm.restore(compared.lm.snapshot())
            expected = self.clock(
                "reference", compared.lm,
                lambda s=scored, e=edits: reference.training_step(compared.network, e, s, exact),
            )  # fmt: skip
            compared.network.load_memory_state(moments)
            for name, stepper in steppers.items():
                gradient = self.clock(name, stepper.lm, stepper.learn)
                if stepper is compared:
                    for what, deviation in _deviations(stepper, gradient, *expected).items():
                        deviations.setdefault(what, []).append(deviation)
        rates = self._rates(compared.lm)
        own_rates = {name: self._own_rate(steppers[f"{name}, exact"]) for name in rates}
        rows = {}
        for name in steppers:
            operations = statistics.median(sum(counts.values()) for counts in floors[name])
            dtype = name.split(",")[0]
            rows[name] = {
                "seconds": self.median(name),
                "times the reference's speed": self.median("reference") / self.median(name),
                "floor": operations / rates[dtype],
                "over the floor": self.median(name) * rates[dtype] / operations,
                "over that of its own products": self.median(name) * own_rates[dtype] / operations,
                ONCE: self.median(name) * own_rates[dtype] / statistics.median(floors_once[name]),
            }
        return {
            "rows": {"reference": {"seconds": self.median("reference")}, **rows},
            "greatest relative deviation": {what: max(values) for what, values in deviations.items()},
            "operations a second": {"one large product": rates, "a pass's own products": own_rates},
            "operations": {name: floors[name][-1] for name in list(steppers)[:2]},
            "seconds a fact": {name: row["seconds"] / args.batch_size for name, row in rows.items()},
        }

    def _rates(self, lm: EditableLM) -> dict[str, float]:
        d_in, d_out = next(iter(lm.module_shapes.values()))
        rows = max(1024, lm.max_tokens_per_pass)
        return {
            name: matmul_rate(getattr(torch, name), str(lm.device), (rows, d_in, d_out)) for name in self.args.dtypes
        }

    def _own_rate(self, stepper: Stepper) -> float:
        """The :func:`pass_rate` of forward passes with as many tokens and answers as those of the step."""
        tokens, answers = sum(map(len, stepper.edits)), sum(len(p.targets) for p in stepper.edits)
        tokens_per_pass = stepper.lm.max_tokens_per_pass
        return pass_rate(stepper.lm, tokens_per_pass, max(1, round(tokens_per_pass * answers / tokens)))

    def _floor(
        self, stepper: Stepper, config: RewardConfig, sampled: bool, once: bool = False
    ) -> dict[str, float]:
        """Operations of the next step, by part."""
        floor = Floor(stepper.lm, once)
        batches = stepper.batches(config)
        if sampled:
            batches = batches[: self.args.samples + 1]
        parts = [
            [p for r, c in zip(b.records, b.choices, strict=True) for p in component.passages(r, c)]
            for b in batches
            for _, component in config.components.values()
        ]
        new = parts[: len(config.components)]
        unrelated = [p for part, (_, c) in zip(new, config.components.values(), strict=True)
                     if c.needs_reference for p in part]  # fmt: skip
        scored = [p for part in parts for p in part]
        return {
            **floor.step(stepper.edits, [p for part in new for p in part], unrelated, scored),
            "network": floor.policy(stepper.network, len(stepper.observation["mask"]), learn=True),
        }

    def edit(self) -> dict[str, Any]:
        """Compare the editing phase, batches of new facts without a reward, with the reference."""
        args = self.args
        n, batches = args.edit_batch_size, args.repeats + 1
        small = replace(args, rank=256, blocks=2)
        steppers = {f"editing, {name}": Stepper(args, self.load(name), "none", batches, n) for name in args.dtypes}
        last = args.dtypes[-1]
        steppers[f"editing, {last}, rank 256, 2 blocks"] = Stepper(small, self.load(last), "none", batches, n)
        compared = steppers[f"editing, {args.dtypes[0]}"]
        reference = self.reference()

        def plain(edits: Sequence[Any]) -> None:
            with torch.no_grad():
                reference.apply(reference.update(compared.network, *_with_gradient(reference.trace, edits)))

        for _ in range(args.repeats):
            edits, moments = compared.edits, compared.network.memory_state()
            reference.lm.restore(compared.lm.snapshot())
            self.clock("editing, reference", compared.lm, lambda e=edits: plain(e))
            compared.network.load_memory_state(moments)
            for name, stepper in steppers.items():
                self.clock(name, stepper.lm, stepper.edit)
        names = ["editing, reference", *steppers]
        plain_seconds = self.median(names[0])
        return {
            name: {
                "seconds": self.median(name),
                "facts a second": n / self.median(name),
                "times the reference's speed": plain_seconds / self.median(name),
            }
            for name in names
        }

    def solve(self) -> dict[str, Any]:
        """Compare the dual form and the normal equations of ridge least squares, for one module and random factors."""
        results = {}
        rows, d_out, damping = 300, 4096, 1.0
        device = resolve_device(self.args.device)
        for d_in in self.args.solve_widths:
            generator = torch.Generator(device=device).manual_seed(0)
            u = torch.randn(rows, d_in, device=device, generator=generator)
            v = torch.randn(rows, d_out, device=device, generator=generator)

            def dual(u: Tensor = u) -> Tensor:
                gram = u @ u.T + damping * torch.eye(rows, device=u.device)
                return torch.cholesky_solve(u, torch.linalg.cholesky(gram))

            def primal(u: Tensor = u, v: Tensor = v, d_in: int = d_in) -> Tensor:
                ridge = damping * torch.eye(d_in, device=u.device, dtype=u.dtype)
                return torch.linalg.solve(u.T @ u + ridge, u.T @ v).T

            dual()
            seconds = [timed(device, dual)[0] for _ in range(5)]
            primal_seconds, _ = timed(device, primal)
            # Normal equations in float32 have larger rounding errors than the dual, so compare with float64.
            u64 = u.double()
            factor = torch.linalg.cholesky(u64.T @ u64 + damping * torch.eye(d_in, device=device, dtype=u64.dtype))
            update = torch.cholesky_solve(u64.T @ v.double(), factor).T.float()
            del factor
            results[str(d_in)] = {
                "dual": statistics.median(seconds),
                "primal": primal_seconds,
                "times the primal's speed": primal_seconds / statistics.median(seconds),
                "relative deviation": _deviation(v.T @ dual(), update),
            }
            print(f"  solve, d_in {d_in}: {results[str(d_in)]}", flush=True)
        return results

    def memory(self) -> dict[str, Any]:
        """Peak memory of a training step above that of the model, for each implementation in its own process."""
        result = {}
        for path in ("reference", "package"):
            command = [sys.executable, __file__, *sys.argv[1:], "--peak-of", path]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            result["model and network"], result[path] = map(int, output.split()[-2:])
        return {**result, "package / reference": result["package"] / result["reference"]}

    def peak(self, path: str) -> tuple[int, int]:
        """Bytes in use before a step of one implementation, and the additional bytes at its peak.

        On a GPU these are bytes of tensors, on a CPU bytes of the process.
        """
        args = self.args
        config = RewardConfig(backtracking_depth=args.depth, regularisation=0.0)
        lm = self.load(args.dtypes[0], optimize=path == "package")
        stepper = Stepper(args, lm, config, args.depth + 1, args.batch_size)
        device = stepper.lm.device
        if path == "package":  # measured from here on, since its caches count as memory of the step
            start = _reset_peak(device)
            stepper.edit_quickly(args.depth)
            stepper.learn()
        else:
            stepper.steps = args.depth
            start = _reset_peak(device)
            self.reference(stepper.lm).training_step(stepper.network, stepper.edits, stepper.batches(config), config)
        return start, _peak(device) - start

    def growth(self) -> dict[str, Any]:
        """Seconds of a step by n, by k, and by the number of edits so far."""
        args, result = self.args, {}
        base = RewardConfig(backtracking_depth=args.depth, regularisation=0.0)
        for what, sizes in (("n", args.growth_batch_sizes), ("k", args.growth_depths)):
            seconds_by_size = {}
            for size in sizes:
                n, k = (size, args.depth) if what == "n" else (args.batch_size, size)
                config = replace(base, backtracking_depth=k)
                stepper = Stepper(args, self.load(args.dtypes[-1]), config, k + args.repeats + 1, n)
                stepper.edit_quickly(k)
                for _ in range(args.repeats):
                    self.clock(f"{what} = {size}", stepper.lm, stepper.learn)
                seconds_by_size[str(size)] = self.median(f"{what} = {size}")
            result[f"seconds by {what}"] = seconds_by_size
        config = replace(base, backtracking_samples=args.samples)
        steps = args.growth_edits // args.batch_size
        stepper = Stepper(args, self.load(args.dtypes[-1]), config, steps, args.batch_size)
        with torch.no_grad():
            stepper.network.log_step_size -= 2.3  # small enough that thousands of edits do not break the model
        seconds = [timed(stepper.lm.device, stepper.learn)[0] for _ in tqdm(range(steps), desc="edits", unit="batch")]
        result["seconds by edits so far"] = {str((i + 1) * args.batch_size): s for i, s in enumerate(seconds)}
        tenth = max(1, steps // 10)
        result["last tenth / second tenth"] = statistics.median(seconds[-tenth:]) / statistics.median(
            seconds[tenth : 2 * tenth]
        )
        return result


def _deviations(
    stepper: Stepper, gradient: Sequence[Tensor], updates: Mapping[str, Tensor], scored: Scored,
    expected_gradient: Sequence[Tensor],
) -> dict[str, float]:  # fmt: skip
    """The greatest relative deviations of a stepper's last step from the reference's updates, losses and gradient."""
    keys, values = stepper.factors
    pairs = {
        "loss": [(torch.tensor(stepper.loss), torch.tensor(scored.loss))],
        "ΔW": [(values[m].T @ keys[m], updates[m].detach()) for m in keys],
        "gradient of the weights": [(-stepper.weight_gradient[m], scored.gradient[m]) for m in keys],
        "gradient of the network": [(a, -b) for a, b in zip(gradient, expected_gradient, strict=True)],
    }
    return {what: max(_deviation(a, b) for a, b in tensors) for what, tensors in pairs.items()}


def _with_gradient(work: Callable[..., Any], *arguments: Any) -> Any:
    with torch.enable_grad():
        return work(*arguments)


def _deviation(a: Tensor, b: Tensor) -> float:
    """‖a − b‖ / ‖b‖."""
    return float((a - b).norm() / b.norm().clamp(min=1e-30))


def _reset_peak(device: torch.device) -> int:
    """Reset the peak of memory and return the bytes in use."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    Path("/proc/self/clear_refs").write_text("5")  # Linux: resets VmHWM, the peak
    return _status("VmRSS")


def _peak(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _status("VmHWM")


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(field)).split()[1])


def plot_growth(result: Mapping[str, Any], path: Path) -> None:
    """Plot the seconds per step by n, by k and by edits so far."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(12, 3.5), constrained_layout=True)
    for axis, what in zip(axes, ("n", "k", "edits so far"), strict=True):
        curve = result[f"seconds by {what}"]
        axis.plot([int(x) for x in curve], list(curve.values()), "o-" if len(curve) < 20 else ".", markersize=3)
        axis.set(xlabel=what, ylabel="seconds a training step", ylim=(0, None))
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def formatted(section: str, result: Mapping[str, Any]) -> str:
    """The numbers of a section as text."""
    if section == "step":
        columns = [
            "seconds", "times the reference's speed", "floor", "over the floor", "over that of its own products", ONCE
        ]  # fmt: skip
        rows = [[name, *(f"{row[c]:.3g}" if c in row else "" for c in columns)] for name, row in result["rows"].items()]
        parts = [[part, *(f"{counts[part] / 1e9:.0f}" for counts in result["operations"].values())]
                 for part in next(iter(result["operations"].values()))]  # fmt: skip
        rest = {k: v for k, v in result.items() if k not in ("rows", "operations")}
        return "\n".join(
            [
                text_table(["training step", *columns], rows),
                text_table(["10⁹ operations that it must do", *result["operations"]], parts),
                json.dumps(rest, ensure_ascii=False),
            ]
        )
    if section == "edit":
        columns = ["seconds", "facts a second", "times the reference's speed"]
        return text_table(["", *columns], [[n, *(f"{r[c]:.3g}" for c in columns)] for n, r in result.items()])
    short = {k: v for k, v in result.items() if k != "seconds by edits so far"}
    return f"{section}: {json.dumps(short, ensure_ascii=False)}"


def main(args: Args) -> None:
    torch.set_num_threads(args.threads)
    benchmark = Benchmark(args)
    if args.peak_of:
        print(*benchmark.peak(args.peak_of))
        return
    results: dict[str, Any] = {}
    for section in args.sections:
        print(section, flush=True)
        results[section] = getattr(benchmark, section)()
        print(formatted(section, results[section]), flush=True)
        settings = json.loads(json.dumps(asdict(args), default=str))
        content = {"settings": settings, "versions": versions(), "results": results}
        write_text(args.out / "speed.json", json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    if "growth" in results:
        plot_growth(results["growth"], args.out / "growth.png")
    print(f"written: {args.out}")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
