"""The recipe: everything that defines a run, checked before anything loads.

A recipe has a `model`, a `tokenizer`, `data` and a list of `stages`. This file holds the fields and the rules
between them; `recipe_load.py` reads YAML, applies `dotted.key=value` overrides and words the errors.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from kimi_rl.errors import InputError
from kimi_rl.rewards.kinds import check_kind
from kimi_rl.rewards.terms import NAMED, build_term, check_name, term_name

Positive = Annotated[int, Field(ge=1)]
NonNegative = Annotated[int, Field(ge=0)]


class Section(BaseModel):
    """A part of a recipe. Unknown keys are refused; `recipe_load` names the nearest known one."""

    model_config = ConfigDict(extra="forbid", validate_default=True, allow_inf_nan=False)


class ModelSection(Section):
    """Which model to start from: a preset built from scratch, or a folder or hub id (`path`)."""

    path: str | None = Field(None, description="Folder or hub id; for `sft` alone also a source. Unset: from scratch.")
    arch: Literal["hybrid", "mla"] = Field("hybrid", description="`hybrid`: 3 KDA layers to 1 MLA; `mla`: all MLA.")
    size: str = Field("tiny", description="Preset of a from-scratch model (see `kimi_rl/model/presets.py`).")
    mlp: Literal["dense", "moe"] = Field("dense", description="Feed-forward layers of a from-scratch model.")
    layer_types: list[Literal["linear_attention", "full_attention"]] | None = Field(
        None, description="Any pattern of layers; overrides `arch`."
    )
    overrides: dict[str, Any] = Field(default_factory=dict, description="Any field of transformers' KimiLinearConfig.")


class TokenizerSection(Section):
    """Tokenizer of a from-scratch model. A model with `path` brings its own."""

    kind: Literal["bytes", "bpe"] = Field("bytes", description="`bytes`: one token a byte; `bpe`: trained on the data.")
    vocab_size: Positive = Field(1024, description="Size of a `bpe` vocabulary, special tokens included.")


class DataSection(Section):
    """Problems to train on and to evaluate on."""

    task: str | None = Field(None, description="Procedural: arithmetic, palindrome, mqar, stack, reasoning_gym/NAME.")
    path: str | None = Field(None, description="A hub id (openai/gsm8k), or a local folder or file in its columns.")
    params: dict[str, Any] = Field(default_factory=dict, description="Parameters of a procedural task.")
    train_size: Positive | None = Field(None, description="Training problems; unset: all (built-in tasks: 20,000).")
    held_out_size: Positive | None = Field(None, description="Held-out problems for evaluation (default 256).")
    seed: int = Field(0, description="Seed of procedural problems and of subsampling; not the run's seed.")
    instruction: str | None = Field(None, description="Text appended to every question; unset: the data set's own.")
    overlap: Literal["refuse", "leave_out", "allow"] = Field(
        "refuse", description="What of training problems that are held-out problems too, or nearly the same ones."
    )
    check_golds: bool = Field(
        True, description="Leave out problems whose gold answer cannot be read as maths; false for another reward.kind."
    )

    @model_validator(mode="after")
    def _one_source(self) -> DataSection:
        if (self.task is None) == (self.path is None):
            found = "both" if self.task is not None else "neither"
            raise ValueError(f"needs exactly one of `task` and `path`, found {found}")
        return self


class EvalSection(Section):
    """How held-out accuracy is measured."""

    every: NonNegative = Field(0, description="Evaluate every N steps inside the stage; 0: only before and after it.")
    limit: Positive | None = Field(None, description="Use the first N held-out problems; unset: all.")
    k: NonNegative = Field(0, description="Samples per problem for avg@k, pass@k and maj@k; 0: greedy.")
    temperature: float = Field(1.0, gt=0)
    max_tokens: Positive | None = Field(None, description="Unset: the stage's own completion length.")


class RolloutSection(Section):
    """Where and how completions are generated."""

    engine: Literal["auto", "transformers", "vllm"] = "auto"
    workers: Positive | Literal["auto"] = Field(
        1, description="Engines; `auto`: as many on each card as a measurement at the start says keep it busy."
    )
    min_workers: Positive | None = Field(
        None, description="Go on with so few workers once others have used up their restarts; unset: with all or none."
    )
    batch_size: Positive = Field(128, description="Sequences a worker decodes at once (transformers engine).")
    temperature: float = Field(1.0, gt=0)
    top_p: float = Field(1.0, gt=0, le=1)
    max_tokens: Positive = Field(128, description="Longest completion, in tokens.")
    slice_tokens: Positive | None = Field(
        None,
        description="Overlapped rollouts: a worker gives a completion back after so many tokens, and goes on with it"
        " after taking newer weights (partial rollouts); unset: completions are finished in one go.",
    )
    cards: NonNegative = Field(
        0, description="NVIDIA cards for the workers, beside one for the learner; 0: all share the learner's."
    )
    weight_sync: Literal["auto", "object_store", "cuda_ipc", "nccl"] = Field(
        "auto",
        description="How weights reach workers; `auto`: `cuda_ipc` on one card, `nccl` between cards, on a CPU"
        " `object_store`.",
    )
    timeout_s: float = Field(600.0, gt=0, description="A worker that answers no request for so long is restarted.")
    start_timeout_s: float = Field(900.0, gt=0, description="The same while it loads its engine.")
    max_restarts: NonNegative = Field(3, description="Restarts of one worker before the run gives up.")
    engine_args: dict[str, Any] = Field(
        default_factory=dict,
        description="Passed to the vLLM engine; gpu_memory_utilization is for all workers of a card together.",
    )

    @model_validator(mode="after")
    def _enough_workers(self) -> RolloutSection:
        if self.workers != "auto" and self.cards > self.workers:
            raise ValueError(f"cards ({self.cards}) must not exceed workers ({self.workers})")
        if self.min_workers is not None and self.workers != "auto" and self.min_workers > self.workers:
            raise ValueError(f"min_workers ({self.min_workers}) must not exceed workers ({self.workers})")
        return self


class SFTStage(Section):
    """Supervised fine-tuning on the worked solutions (trl.SFTTrainer, loss on the assistant turn only)."""

    kind: Literal["sft"]
    name: str = Field("sft", pattern=r"^[A-Za-z0-9_-]+$")
    data: DataSection | None = Field(None, description="Problems of this stage alone; unset: the recipe's.")
    steps: Positive
    batch_size: Positive = 32
    micro_batch_size: Positive | None = Field(None, description="Samples per forward; unset: batch_size.")
    learning_rate: float = Field(1e-3, gt=0)
    warmup_steps: NonNegative = 0
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    weight_decay: float = Field(0.0, ge=0)
    max_grad_norm: float = Field(1.0, gt=0)
    max_length: Positive = Field(512, description="Samples longer than this many tokens are dropped, with a count.")
    checkpoint_every: Positive = 50
    rollout: RolloutSection = Field(default_factory=RolloutSection, description="Used for evaluation.")
    eval: EvalSection | None = Field(
        default_factory=EvalSection, description="`null`: no evaluation and no engine; a plain transformer needs it so."
    )

    @model_validator(mode="after")
    def _arithmetic(self) -> SFTStage:
        micro = self.micro_batch_size or self.batch_size
        if self.batch_size % micro:
            raise ValueError(
                f"batch_size ({self.batch_size}) must be a multiple of micro_batch_size ({micro}): "
                f"{self.batch_size} % {micro} = {self.batch_size % micro}"
            )
        if self.warmup_steps > self.steps:
            raise ValueError(f"warmup_steps ({self.warmup_steps}) must not exceed steps ({self.steps})")
        return self


class DistillStage(Section):
    """Learn from the model that this one was converted from: layer by layer, or by its distributions over tokens."""

    kind: Literal["distill"]
    name: str = Field("distill", pattern=r"^[A-Za-z0-9_-]+$")
    teacher: str = Field(description="Folder, hub id, GGUF file or folder with one: of equal shape and vocabulary.")
    match: Literal["layers", "logits"] = Field(
        description="`layers`: each token mixer gives what the teacher's attention gives on the teacher's states; "
        "`logits`: KL to the teacher's distributions, and cross-entropy on the text."
    )
    train: Literal["auto", "mixers", "all"] = Field(
        "auto", description="Which parameters move; `auto`: with `layers` the token mixers, with `logits` all."
    )
    data: DataSection | None = Field(None, description="Problems whose solutions are read; unset: the recipe's.")
    more_data: list[DataSection] = Field(default_factory=list, description="Problems that are read as well.")
    texts: str | None = Field(
        None, description="JSON lines that are read as well: `text`, or what `kimi-rl generate --json` wrote."
    )
    steps: Positive
    max_length: Positive = Field(1024, description="Longer texts are cut after so many tokens, with a count.")
    batch_tokens: Positive = Field(32768, description="Tokens per optimizer step, in rows of `pack_tokens`.")
    pack_tokens: Positive = Field(16384, description="Tokens of one forward; bounds memory. Whole texts fill a row.")
    learners: Positive = Field(
        1, description="Processes that divide a step's rows, each on an NVIDIA card of its own. No `eval` with several."
    )
    optimizer: Literal["muon", "adamw"] = Field("muon", description="`muon`: AdamW where Muon has no meaning.")
    learning_rate: float = Field(1e-3, gt=0)
    warmup_steps: NonNegative = 0
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    weight_decay: float = Field(0.0, ge=0)
    max_grad_norm: float = Field(1.0, gt=0)
    temperature: float = Field(1.0, gt=0, description="`logits` only: of both distributions in the KL.")
    kl: float = Field(1.0, ge=0, description="`logits` only: weight of the KL, in nats per token.")
    ce: float = Field(0.1, ge=0, description="`logits` only: weight of the cross-entropy on the text.")
    log_every: Positive = Field(10, description="A row of metrics every N steps: each reads figures from the device.")
    perplexity_every: NonNegative = Field(
        100, description="Held-out figures every N steps; 0: only before and after the stage."
    )
    checkpoint_every: Positive = 100
    rollout: RolloutSection = Field(default_factory=RolloutSection, description="Used with `eval`.")
    eval: EvalSection | None = Field(None, description="Held-out accuracy as well; unset: perplexity alone.")

    @property
    def train_all(self) -> bool:
        return self.train == "all" or (self.train == "auto" and self.match == "logits")

    @property
    def rows_per_step(self) -> int:
        return self.batch_tokens // self.pack_tokens

    @model_validator(mode="after")
    def _arithmetic(self) -> DistillStage:
        if self.batch_tokens % self.pack_tokens:
            raise ValueError(
                f"batch_tokens ({self.batch_tokens}) must be a multiple of pack_tokens ({self.pack_tokens}): "
                f"{self.batch_tokens} % {self.pack_tokens} = {self.batch_tokens % self.pack_tokens}"
            )
        if self.rows_per_step % self.learners:
            raise ValueError(
                f"a step has {self.rows_per_step} rows (batch_tokens / pack_tokens), which {self.learners} learners "
                f"cannot divide evenly; set batch_tokens to a multiple of {self.learners * self.pack_tokens}"
            )
        if self.learners > 1 and self.eval is not None:
            raise ValueError("learners: several cannot evaluate by rollouts; take out eval, or set learners: 1")
        if self.max_length > self.pack_tokens:
            raise ValueError(f"max_length ({self.max_length}) must not exceed pack_tokens ({self.pack_tokens})")
        if self.warmup_steps > self.steps:
            raise ValueError(f"warmup_steps ({self.warmup_steps}) must not exceed steps ({self.steps})")
        if self.checkpoint_every % self.log_every:
            raise ValueError(
                f"checkpoint_every ({self.checkpoint_every}) must be a multiple of log_every ({self.log_every}), "
                "so that a resumed run writes the same rows"
            )
        if self.match == "layers":
            for key in ("temperature", "kl", "ce"):
                if getattr(self, key) != type(self).model_fields[key].default:
                    raise ValueError(f"{key} has no meaning with match: layers; take it out, or set match: logits")
            if self.train == "all":
                raise ValueError("train: all needs match: logits; with match: layers only token mixers have a gradient")
        elif not self.kl + self.ce:
            raise ValueError("kl and ce are both 0: nothing would be learned")
        return self


class ImportanceSampling(Section):
    """Correction of the difference between the rollout engine and the trainer (truncated importance sampling)."""

    enabled: bool = True
    mode: Literal["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"] = "token_truncate"
    cap: float = Field(2.0, gt=0, description="Upper bound of the ratio trainer / engine.")


class MismatchGate(Section):
    """Bar on the difference between trainer and engine log-probs; passing it `patience` steps running ends the run."""

    max_kl: float | None = Field(0.02, gt=0, description="Bar on the mean k3 KL per token; unset: never stop.")
    patience: Positive = 3
    probe_every: Positive = Field(
        10, description="Where rollouts run ahead, draw a few completions for the comparison every so many steps."
    )


class RewardTerm(Section):
    """A further term of the reward."""

    use: str = Field(
        description="`think_format`, `think_answer_format`, `overlong` (DAPO), `repetition`, or a TRL reward "
        "function as `package.module:function`."
    )
    weight: float = Field(1.0, description="Its factor in the sum.")
    params: dict[str, Any] = Field(default_factory=dict, description="See docs/rewards.md.")

    @field_validator("use")
    @classmethod
    def _known(cls, use: str) -> str:
        check_name(use)
        return use


class RewardSection(Section):
    """How a completion is scored: the verdict on its answer, and in training further terms. Evaluation has none."""

    kind: str = Field(
        "auto",
        description="`math`: equivalence; `exact`: the same text; `integer`; `choice`; `auto`: what the data needs; or "
        " your own function(answer, gold) as `package.module:function`.",
    )
    extract: list[Literal["boxed", "hash", "answer"]] = Field(
        ["boxed", "hash"], description="Markers of a final answer; empty: the whole completion is the answer."
    )
    terms: list[RewardTerm] = Field(default_factory=list, description="Added to the verdict in rlvr stages.")
    deadline_s: float = Field(5.0, gt=0, description="A verdict that takes longer is `timeout`, scored 0.")
    workers: Positive = 1

    @field_validator("kind")
    @classmethod
    def _known_kind(cls, kind: str) -> str:
        if kind != "auto":
            check_kind(kind)
        return kind


class PTXSection(Section):
    """A supervised loss beside the RL loss, on a stream of worked solutions, against forgetting (K1.5's PTX loss)."""

    weight: float = Field(0.1, gt=0, description="Lambda: factor of the mean NLL per solution token.")
    batch_size: Positive = Field(16, description="Solutions per optimizer step.")
    data: DataSection | None = Field(None, description="Where the solutions come from; unset: the stage's problems.")
    max_length: Positive = Field(512, description="Samples longer than this many tokens are left out.")


class KLControl(Section):
    """Steers the KL coefficient (`tau` with `k15`, else `beta`) so that a step moves the policy by `target`."""

    target: float = Field(gt=0, description="KL per token, in nats: of a step with `k15`, else to the reference.")
    min: float = Field(1e-3, gt=0)
    max: float = Field(10.0, gt=0)
    rate: float = Field(0.1, gt=0, le=1, description="Largest relative change of the coefficient per step.")


class UpdateControl(Section):
    """Steers the number of optimizer steps per rollout batch between `min` and `max`."""

    min: Positive = 1
    max: Positive = 4
    max_kl: float = Field(0.05, gt=0, description="A step that moves the policy further (nats per token) halves them.")
    min_entropy: float = Field(0.05, ge=0, description="So does an entropy below this (nats per token).")
    max_entropy: float | None = Field(None, gt=0, description="And one above this.")
    calm_steps: Positive = Field(5, description="Doubled after so many steps inside the band.")


class DynamicSampling(Section):
    """Groups that are all right or all wrong teach nothing: they are replaced by groups of other prompts (DAPO)."""

    max_rounds: Positive = Field(3, description="Rounds of replacement; what is then still uniform is kept.")


class LengthReward(Section):
    """K1.5's length reward: within a group shorter correct answers gain, longer ones lose, up to half of `weight`."""

    weight: float = Field(0.1, gt=0)
    warmup_steps: NonNegative = Field(0, description="Off for so many steps, then grows linearly for as many again.")


class RLVRStage(Section):
    """Reinforcement learning with verifiable rewards (a trl.GRPOTrainer in a Ray actor)."""

    kind: Literal["rlvr"]
    name: str = Field("rlvr", pattern=r"^[A-Za-z0-9_-]+$")
    data: DataSection | None = Field(None, description="Problems of this stage alone; unset: the recipe's.")
    steps: Positive = Field(description="Rollout batches. Each is followed by `updates_per_step` optimizer steps.")
    prompts_per_step: Positive = 16
    group_size: int = Field(8, ge=2, description="Completions per prompt.")
    batch_size: Positive | None = Field(
        None, description="Completions per step; unset: prompts_per_step x group_size, which it must equal."
    )
    prompt_order: Literal["shuffle", "prioritized", "curriculum"] = Field(
        "shuffle",
        description="`prioritized`: in proportion to 1 - a problem's running success; `curriculum`: easy ones first.",
    )
    curriculum_steps: Positive | None = Field(
        None, description="Steps until all problems are in; unset: half of steps."
    )
    dynamic_sampling: DynamicSampling | None = None
    updates_per_step: Positive = Field(1, description="Optimizer steps per rollout batch; `update_control` moves it.")
    micro_batch_size: Positive | None = Field(None, description="Completions per micro-batch; unset: an update's.")
    learning_rate: float = Field(1e-4, gt=0)
    warmup_steps: NonNegative = 0
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    weight_decay: float = Field(0.0, ge=0)
    max_grad_norm: float = Field(1.0, gt=0)
    loss_type: Literal["grpo", "dr_grpo", "dapo", "bnpo", "cispo", "sapo", "luspo", "k15"] = Field(
        "dapo", description="A loss of TRL, or `k15`: Kimi K1.5's mirror descent (see kimi_rl/objective.py)."
    )
    tau: float = Field(0.1, gt=0, description="`k15` only: strength of the penalty on the sequence log-ratio.")
    scale_rewards: Literal["group", "batch", "none"] = "group"
    epsilon: float = Field(0.2, gt=0)
    epsilon_high: float | None = Field(None, gt=0)
    beta: float = Field(0.0, ge=0, description="Coefficient of the KL penalty against the stage's starting model.")
    kl_control: KLControl | None = None
    update_control: UpdateControl | None = None
    ptx: PTXSection | None = None
    length_reward: LengthReward | None = None
    max_staleness: NonNegative = Field(
        0, description="Policy versions by which a token may be older than the learner; above 0 rollouts run ahead."
    )
    overlap: Literal["auto", "on", "off"] = Field(
        "auto", description="Rollouts in the background; `auto`: with max_staleness above 0."
    )
    mask_truncated: bool = Field(False, description="Leave completions that hit max_tokens out of the loss.")
    packing: Literal["auto", "off", "packed", "shared_prompt"] = Field(
        "auto",
        description="`packed`: no padding in the learner; `shared_prompt`: nor a group's prompt run more than once; "
        "`off`: padded batches; `auto`: `packed`. See docs/packing.md.",
    )
    pack_tokens: Positive = Field(16384, description="Tokens of one forward and backward; bounds memory.")
    importance_sampling: ImportanceSampling = Field(default_factory=ImportanceSampling)
    mismatch: MismatchGate = Field(default_factory=MismatchGate)
    rollout: RolloutSection = Field(default_factory=RolloutSection)
    checkpoint_every: Positive = 20
    eval: EvalSection | None = Field(default_factory=EvalSection, description="`null`: no evaluation.")

    @property
    def completions_per_step(self) -> int:
        return self.prompts_per_step * self.group_size

    @property
    def completions_per_update(self) -> int:
        return self.completions_per_step // self.updates_per_step

    @property
    def most_updates(self) -> int:
        return max(self.updates_per_step, self.update_control.max if self.update_control else 1)

    @property
    def micro_batch(self) -> int:
        return self.micro_batch_size or self.completions_per_step // self.most_updates

    @property
    def overlapped(self) -> bool:
        return self.overlap == "on" or (self.overlap == "auto" and self.max_staleness > 0)

    @model_validator(mode="after")
    def _arithmetic(self) -> RLVRStage:
        if self.batch_size is not None and self.batch_size % self.group_size:
            raise ValueError(
                f"group_size ({self.group_size}) must divide batch_size ({self.batch_size}): "
                f"{self.batch_size} % {self.group_size} = {self.batch_size % self.group_size}"
            )
        total = self.completions_per_step
        sizes = f"prompts_per_step ({self.prompts_per_step}) x group_size ({self.group_size}) = {total}"
        if self.batch_size is not None and self.batch_size != total:
            raise ValueError(f"batch_size ({self.batch_size}) must equal {sizes}")
        if total % self.updates_per_step:
            raise ValueError(
                f"updates_per_step ({self.updates_per_step}) must divide {sizes}: "
                f"{total} % {self.updates_per_step} = {total % self.updates_per_step}"
            )
        if self.update_control is not None:
            self._check_update_control(total, sizes)
        if self.completions_per_update % self.micro_batch:
            raise ValueError(
                f"micro_batch_size ({self.micro_batch}) must divide the completions of one update "
                f"({total} / updates_per_step {self.updates_per_step} = {self.completions_per_update})"
            )
        if self.loss_type == "k15" and self.scale_rewards != "none":
            raise ValueError(
                f"loss_type k15 takes rewards unscaled: set scale_rewards to none, found {self.scale_rewards}"
            )
        if self.kl_control is not None:
            self._check_kl_control()
        if self.max_staleness and self.overlap == "off":
            raise ValueError(f"max_staleness ({self.max_staleness}) needs overlap: auto or on, found off")
        if self.rollout.slice_tokens is not None and not self.max_staleness:
            raise ValueError("rollout.slice_tokens needs overlapped rollouts: set max_staleness above 0")
        if self.curriculum_steps is not None and self.prompt_order != "curriculum":
            raise ValueError(f"curriculum_steps needs prompt_order: curriculum, found {self.prompt_order}")
        if self.epsilon_high is not None and self.epsilon_high < self.epsilon:
            raise ValueError(f"epsilon_high ({self.epsilon_high}) must not be below epsilon ({self.epsilon})")
        return self

    def _check_update_control(self, total: int, sizes: str) -> None:
        control = self.update_control
        if not control.min <= self.updates_per_step <= control.max:
            raise ValueError(
                f"updates_per_step ({self.updates_per_step}) must be between update_control.min ({control.min}) and "
                f"update_control.max ({control.max})"
            )
        if total % control.max or total // control.max % self.micro_batch:
            raise ValueError(
                f"update_control.max ({control.max}) must cut {sizes} into whole micro-batches of {self.micro_batch}"
            )

    def _check_kl_control(self) -> None:
        start = self.tau if self.loss_type == "k15" else self.beta
        name = "tau" if self.loss_type == "k15" else "beta"
        low, high = self.kl_control.min, self.kl_control.max
        if not low <= start <= high:
            raise ValueError(f"kl_control moves {name}, which starts at {start:g}: it must be in [{low:g}, {high:g}]")


Stage = Annotated[SFTStage | DistillStage | RLVRStage, Field(discriminator="kind")]


class Recipe(Section):
    """A whole run."""

    name: str = Field("run", pattern=r"^[A-Za-z0-9_.-]+$")
    seed: int = Field(0, ge=0, description="Seeds the model's weights, the data order and every sample.")
    precision: Literal["auto", "fp32", "bf16_autocast"] = Field(
        "auto", description="`auto`: fp32 on a CPU, fp32 master weights with bf16 autocast on a GPU."
    )
    threads: NonNegative = Field(0, description="CPU threads of each actor; 0: all cores.")
    kernel_cache: str | None = Field(
        None, description="Folder that keeps compiled GPU kernels; unset: $KIMI_RL_KERNEL_CACHE, or the libraries' own."
    )
    report_to: list[Literal["tensorboard", "wandb", "trackio"]] = Field(default_factory=list)
    model: ModelSection = Field(default_factory=ModelSection)
    tokenizer: TokenizerSection = Field(default_factory=TokenizerSection)
    data: DataSection
    reward: RewardSection = Field(default_factory=RewardSection)
    stages: list[Stage] = Field(min_length=1)

    def all_data(self) -> list[DataSection]:
        """The recipe's problems and those that stages bring along."""
        own = [stage.data for stage in self.stages]
        own += [stage.ptx.data for stage in self.stages if stage.kind == "rlvr" and stage.ptx is not None]
        own += [data for stage in self.stages if stage.kind == "distill" for data in stage.more_data]
        return [self.data, *(data for data in own if data is not None)]

    @model_validator(mode="after")
    def _own_rewards_read_their_own_golds(self) -> Recipe:
        if self.reward.kind not in ("auto", "math"):
            for data in self.all_data():
                data.check_golds = False  # what a gold must look like is then the reward function's business
        return self

    @model_validator(mode="after")
    def _reward_terms(self) -> Recipe:
        names = [term_name(term.use) for term in self.reward.terms]
        for number, (name, term) in enumerate(zip(names, self.reward.terms, strict=True)):
            if names.count(name) > 1:
                raise ValueError(f"reward.terms: {name!r} stands {names.count(name)} times; add up its weights")
            for stage in self.stages if term.use in NAMED else ():
                if isinstance(stage, RLVRStage):
                    try:
                        build_term(term.use, term.params, max_length=stage.rollout.max_tokens)
                    except InputError as error:
                        raise ValueError(f"reward.terms.{number}: {error} (stage {stage.name})") from None
        return self

    @model_validator(mode="after")
    def _unique_names(self) -> Recipe:
        names = [stage.name for stage in self.stages]
        for name in names:
            if names.count(name) > 1:
                count = names.count(name)
                raise ValueError(f"stages: the name {name!r} stands {count} times; give each its own `name`")
        return self
