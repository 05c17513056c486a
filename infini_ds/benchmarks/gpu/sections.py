"""What the report on a GPU consists of: sections, and the cases of each, at full size and in small.

The small form has the same cases on models of a few weights, so that a CPU runs it too.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from infini_ds.benchmarks.contenders import GENERATING, ModelShape, is_infini
from infini_ds.benchmarks.gpu.comparison import CheckResult
from infini_ds.benchmarks.results import GenerationSpeed, OutOfMemory, Profile, TrainingSpeed
from infini_ds.model.presets import preset_config

SEGMENT_LENGTH = 2048  # of the recipes of these presets
MEASURED_STEPS = 3  # of training; a step to warm up comes before


@dataclass(frozen=True)
class Case:
    """One process.

    Attributes:
        model, label: what a table shows: the size of the model, and what of it is measured.
        kind, arguments: of `infini_ds.benchmarks.worker`.
    """

    model: str
    label: str
    kind: str
    arguments: dict[str, Any]


@dataclass(frozen=True)
class Outcome:
    """What became of a case.

    Attributes:
        state: "passed" or "failed" for a check; "measured"; "error", with its message; "out of memory"; "out of time";
            "not possible" here, with the reason as its message.
    """

    section: str
    case: Case
    state: str
    seconds: float
    result: TrainingSpeed | GenerationSpeed | Profile | OutOfMemory | CheckResult | None = None
    message: str = ""


@dataclass(frozen=True)
class Section:
    """Cases that share a time limit.

    Attributes:
        seconds: that the section may take; what it leaves over, the following sections may take.
        cases: its cases, which may depend on earlier outcomes.
        is_check: the cases are right or wrong, so that one which does not end is a failure.
    """

    name: str
    title: str
    seconds: float
    cases: Callable[[Sequence[Outcome]], list[Case]]
    is_check: bool = True


@dataclass(frozen=True)
class Form:
    """The sizes of everything.

    Attributes:
        checked: the shape of the model that is checked; checked_tokens: of its rows.
        short_segments: tokens of a segment in a row of many_tokens, which has many of them.
        kernels: heads, head size, slots, window and precision of flex attention.
        sizes: the shape of each size of model, the smallest first; tokens: of their rows.
        short_tokens: of rows with which full attention is compared; prompts: tokens before generation.
        bucket: elements in which gradients are reduced; None for those of DeepSpeed's JSON.
        loss_steps: of training in bf16 and in fp32.
    """

    name: str
    checked: ModelShape
    checked_tokens: int
    short_segments: int
    many_tokens: int
    kernels: tuple[tuple[int, int, int, int | None, str], ...]
    sizes: dict[str, ModelShape]
    tokens: int
    short_tokens: int
    prompts: tuple[int, ...]
    loss_steps: int
    bucket: int | None = None


def _preset(name: str) -> ModelShape:
    config = preset_config(name)
    width, layers, heads = config.hidden_size, config.num_layers, config.num_heads
    return ModelShape(
        width, layers, heads, config.vocab_size, SEGMENT_LENGTH, precision="bf16", window=config.window_size
    )


def full_form() -> Form:
    return Form(
        name="full",
        checked=ModelShape(768, 4, 12, 50_257, 512, precision="bf16", window=256),
        checked_tokens=8_000,
        short_segments=16,
        many_tokens=16_384,
        kernels=((12, 64, 2048, None, "bf16"), (16, 128, 2048, 256, "bf16"), (12, 64, 1000, None, "fp32")),
        sizes={name: _preset(name) for name in ("125m", "350m", "1.3b")},
        tokens=32_768,
        short_tokens=4096,
        prompts=(1024, 32_768),
        loss_steps=30,
    )


def small_form() -> Form:
    shape = ModelShape(64, 2, 2, 64, 32, window=16)
    return Form(
        name="small",
        checked=shape,
        checked_tokens=100,
        short_segments=2,
        many_tokens=1024,
        kernels=((2, 16, 64, None, "bf16"), (2, 32, 100, 40, "fp32")),
        sizes={"tiny": replace(shape, width=32), "small": shape},
        tokens=256,
        short_tokens=64,
        prompts=(40, 100),
        loss_steps=12,
        bucket=50_000,
    )


@dataclass(frozen=True)
class _Cases:
    """The cases of a form, section by section."""

    form: Form
    compiles: bool

    @property
    def smallest(self) -> str:
        return next(iter(self.form.sizes))

    @property
    def largest(self) -> str:
        return list(self.form.sizes)[-1]

    def losses(self, _: Sequence[Outcome]) -> list[Case]:
        shape, tokens, steps = self.form.checked, self.form.checked_tokens, self.form.loss_steps
        rules = ("linear", "delta")
        rounding = [self._check(f"loss and gradients, {rule} rule", "rounding", memory_rule=rule) for rule in rules]
        # Summed in bf16, the memory would stop growing after some hundred segments.
        many = {"shape": asdict(replace(shape, segment_length=self.form.short_segments)), "block": 64}
        training = {"shape": asdict(shape), "tokens": tokens, "block": 2, "steps": steps}
        return [
            *rounding,
            Case("", "loss and gradients, many segments", "rounding", many | {"tokens": self.form.many_tokens}),
            Case("", f"{steps} steps of training", "losses", training),
        ]

    def cache(self, _: Sequence[Outcome]) -> list[Case]:
        found = []
        for rule, precision in (("linear", "fp32"), ("linear", "bf16"), ("delta", "fp32")):
            shape = replace(self.form.checked, memory_rule=rule, precision=precision)
            # New tokens cross the end of a segment.
            tokens = self.form.checked_tokens // shape.segment_length * shape.segment_length - 8
            arguments = {"shape": asdict(shape), "tokens": tokens, "new_tokens": 16}
            found.append(Case("", f"{rule} rule, {precision}", "cached_generation", arguments))
        return found

    def flex(self, _: Sequence[Outcome]) -> list[Case]:
        names = ("heads", "head_size", "slots", "window", "precision")
        label = "head size {head_size}, {slots} slots, window {window}, {precision}"
        kernels = [dict(zip(names, kernel, strict=True)) for kernel in self.form.kernels]
        cases = [Case("", label.format(**kernel), "flex_kernel", kernel) for kernel in kernels]
        precision = self.form.checked.precision
        return [*cases, self._check(f"the model, {precision}", "flex_model", precision=precision)]

    def compiled(self, _: Sequence[Outcome]) -> list[Case]:
        ways = (("linear", self.form.checked.precision), ("delta", "fp32"))
        return [
            self._check(f"{rule} rule, {precision}", "compiled", memory_rule=rule, precision=precision)
            for rule, precision in ways
        ]

    def memory(self, _: Sequence[Outcome]) -> list[Case]:
        more = {"tokens": self.form.tokens, "steps": 2, "block": None, "bucket": self.form.bucket}
        return [
            Case(name, "training", "memory_plan", {"shape": asdict(shape)} | more)
            for name, shape in reversed(self.form.sizes.items())
        ]

    def training(self, _: Sequence[Outcome]) -> list[Case]:
        """The most informative cases first, since time may run out."""
        long, short = self.form.tokens, self.form.short_tokens
        fast, slow = ["infini:auto compiled", "infini:all compiled"], ["infini:auto", "infini:all"]
        if not self.compiles:
            fast, slow = slow, []
        others = ["gpt-neo", "gpt-neo:sdpa", "gpt-neo:flash_attention_2", "infini-transformer-pytorch"]
        models = list(reversed(self.form.sizes))
        return [
            *(self._speed(model, contender, long) for model in models for contender in fast),
            *(self._speed(self.smallest, contender, short) for contender in [fast[-1], *others]),
            *(self._speed(self.smallest, contender, long) for contender in others),
            *(self._speed(model, contender, long) for model in models for contender in slow),
        ]

    def generation(self, _: Sequence[Outcome]) -> list[Case]:
        return [
            Case(name, contender, "generation", self._arguments(name, contender, prompt) | {"rows": 1})
            for name in (self.largest, self.smallest)
            for prompt in self.form.prompts
            for contender in GENERATING
        ]

    def profile(self, outcomes: Sequence[Outcome]) -> list[Case]:
        """Profile the largest model in the way that was the fastest."""
        best = best_setting(outcomes, self.largest)
        case = best.case if best else self._speed(self.largest, "infini:auto", self.form.tokens)
        return [replace(case, kind="profile")]

    def _check(self, label: str, kind: str, **changes: str) -> Case:
        shape = replace(self.form.checked, **changes)  # type: ignore[arg-type]
        return Case("", label, kind, {"shape": asdict(shape), "tokens": self.form.checked_tokens, "block": 2})

    def _speed(self, model: str, label: str, tokens: int) -> Case:
        return Case(model, label, "training", self._arguments(model, label, tokens))

    def _arguments(self, model: str, label: str, tokens: int) -> dict[str, Any]:
        contender, _, compiled = label.partition(" ")
        shape = replace(self.form.sizes[model], compiled=bool(compiled))
        return {"contender": contender, "tokens": tokens, "steps": MEASURED_STEPS, "shape": asdict(shape)}


def best_setting(outcomes: Sequence[Outcome], model: str) -> Outcome | None:
    """Return the fastest measurement of this project's model of a size, on its longest rows; None without one."""
    found = [
        one
        for one in outcomes
        if isinstance(one.result, TrainingSpeed) and one.case.model == model and is_infini(one.case.label)
    ]
    return max(found, key=lambda one: (one.case.arguments["tokens"], one.result.tokens_per_s), default=None)  # type: ignore[union-attr]


def all_sections(form: Form, compiles: bool) -> list[Section]:
    """Return the sections in their order. `compiles`: torch.compile is possible here."""
    cases = _Cases(form, compiles)
    return [
        Section("losses", "bf16 against fp32", 60, cases.losses),
        Section("cache", "Generation with the cache against complete recomputation", 45, cases.cache),
        Section("flex", "Flex attention against masks", 80, cases.flex),
        Section("compiled", "Compiled layers against eager ones", 80, cases.compiled),
        Section("memory", "Memory of training against the plan", 70, cases.memory),
        Section("training", "Speed of training", 170, cases.training, is_check=False),
        Section("generation", "Speed of generation", 45, cases.generation, is_check=False),
        Section("profile", "Where the time of a step goes", 50, cases.profile, is_check=False),
    ]
