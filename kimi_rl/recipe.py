"""The recipe: everything that defines a run, checked before anything loads.

A recipe has a `model`, a `tokenizer`, `data` and a list of `stages`. This file holds the fields and the rules
between them; `recipe_load.py` reads YAML, applies `dotted.key=value` overrides and words the errors.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from kimi_rl.rewards.kinds import check_kind

Positive = Annotated[int, Field(ge=1)]
NonNegative = Annotated[int, Field(ge=0)]


class Section(BaseModel):
    """A part of a recipe. Unknown keys are refused; `recipe_load` names the nearest known one."""

    model_config = ConfigDict(extra="forbid", validate_default=True, allow_inf_nan=False)


class ModelSection(Section):
    """Which model to start from: a preset built from scratch, or a folder or hub id (`path`)."""

    path: str | None = Field(None, description="Local folder or hub id. Unset: build `size`/`arch` from scratch.")
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

    task: str | None = Field(None, description="A built-in procedural task: arithmetic, palindrome, mqar, stack.")
    path: str | None = Field(None, description="A hub id (openai/gsm8k), or a local folder or file in its columns.")
    params: dict[str, Any] = Field(default_factory=dict, description="Parameters of a procedural task.")
    train_size: Positive | None = Field(None, description="Training problems to use; procedural tasks: 20,000.")
    held_out_size: Positive | None = Field(None, description="Held-out problems for evaluation (default 256).")
    seed: int = Field(0, description="Seed of procedural problems and of subsampling; not the run's seed.")
    instruction: str | None = Field(None, description="Text appended to every question; unset: the data set's own.")
    allow_overlap: bool = Field(
        False, description="Train although held-out problems, or nearly the same ones, are among the training problems."
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
    workers: Positive = 1
    batch_size: Positive = Field(128, description="Sequences a worker decodes at once (transformers engine).")
    temperature: float = Field(1.0, gt=0)
    top_p: float = Field(1.0, gt=0, le=1)
    max_tokens: Positive = Field(128, description="Longest completion, in tokens.")
    weight_sync: Literal["auto", "object_store", "cuda_ipc"] = Field(
        "auto", description="How weights reach workers; `auto`: `cuda_ipc` on one card, else `object_store`."
    )
    timeout_s: float = Field(600.0, gt=0, description="A worker that answers no request for so long is restarted.")
    start_timeout_s: float = Field(900.0, gt=0, description="The same while it loads its engine.")
    max_restarts: NonNegative = Field(3, description="Restarts of one worker before the run gives up.")
    engine_args: dict[str, Any] = Field(default_factory=dict, description="Passed to the vLLM engine.")


class SFTStage(Section):
    """Supervised fine-tuning on the worked solutions (trl.SFTTrainer, loss on the assistant turn only)."""

    kind: Literal["sft"]
    name: str = Field("sft", pattern=r"^[A-Za-z0-9_-]+$")
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
    eval: EvalSection = Field(default_factory=EvalSection)

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


class ImportanceSampling(Section):
    """Correction of the difference between the rollout engine and the trainer (truncated importance sampling)."""

    enabled: bool = True
    mode: Literal["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"] = "token_truncate"
    cap: float = Field(2.0, gt=0, description="Upper bound of the ratio trainer / engine.")


class MismatchGate(Section):
    """Bar on the difference between trainer and engine log-probs; passing it `patience` steps running ends the run."""

    max_kl: float | None = Field(0.02, gt=0, description="Bar on the mean k3 KL per token; unset: never stop.")
    patience: Positive = 3


class RewardSection(Section):
    """How a completion is scored."""

    kind: str = Field(
        "auto",
        description="`math`: equivalence; `exact`: the same text; `integer`; `choice`; `auto`: what the data needs; or "
        " your own function(answer, gold) as `package.module:function`.",
    )
    extract: list[Literal["boxed", "hash", "answer"]] = Field(
        ["boxed", "hash"], description="Markers of a final answer; empty: the whole completion is the answer."
    )
    deadline_s: float = Field(5.0, gt=0, description="A verdict that takes longer is `timeout`, scored 0.")
    workers: Positive = 1

    @field_validator("kind")
    @classmethod
    def _known_kind(cls, kind: str) -> str:
        if kind != "auto":
            check_kind(kind)
        return kind


class RLVRStage(Section):
    """Reinforcement learning with verifiable rewards (a trl.GRPOTrainer in a Ray actor)."""

    kind: Literal["rlvr"]
    name: str = Field("rlvr", pattern=r"^[A-Za-z0-9_-]+$")
    steps: Positive = Field(description="Rollout batches. Each is followed by `updates_per_step` optimizer steps.")
    prompts_per_step: Positive = 16
    group_size: int = Field(8, ge=2, description="Completions per prompt.")
    batch_size: Positive | None = Field(
        None, description="Completions per step; unset: prompts_per_step x group_size, which it must equal."
    )
    updates_per_step: Positive = 1
    micro_batch_size: Positive | None = Field(None, description="Completions per forward; unset: one update's share.")
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
    mask_truncated: bool = Field(False, description="Leave completions that hit max_tokens out of the loss.")
    importance_sampling: ImportanceSampling = Field(default_factory=ImportanceSampling)
    mismatch: MismatchGate = Field(default_factory=MismatchGate)
    rollout: RolloutSection = Field(default_factory=RolloutSection)
    checkpoint_every: Positive = 20
    eval: EvalSection = Field(default_factory=EvalSection)

    @property
    def completions_per_step(self) -> int:
        return self.prompts_per_step * self.group_size

    @property
    def completions_per_update(self) -> int:
        return self.completions_per_step // self.updates_per_step

    @property
    def micro_batch(self) -> int:
        return self.micro_batch_size or self.completions_per_update

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
        if self.completions_per_update % self.micro_batch:
            raise ValueError(
                f"micro_batch_size ({self.micro_batch}) must divide the completions of one update "
                f"({total} / updates_per_step {self.updates_per_step} = {self.completions_per_update})"
            )
        if self.loss_type == "k15" and self.scale_rewards != "none":
            raise ValueError(
                f"loss_type k15 takes rewards unscaled: set scale_rewards to none, found {self.scale_rewards}"
            )
        if self.epsilon_high is not None and self.epsilon_high < self.epsilon:
            raise ValueError(f"epsilon_high ({self.epsilon_high}) must not be below epsilon ({self.epsilon})")
        return self


Stage = Annotated[SFTStage | RLVRStage, Field(discriminator="kind")]


class Recipe(Section):
    """A whole run."""

    name: str = Field("run", pattern=r"^[A-Za-z0-9_.-]+$")
    seed: int = Field(0, ge=0, description="Seeds the model's weights, the data order and every sample.")
    precision: Literal["auto", "fp32", "bf16_autocast"] = Field(
        "auto", description="`auto`: fp32 on a CPU, fp32 master weights with bf16 autocast on a GPU."
    )
    threads: NonNegative = Field(0, description="CPU threads of each actor; 0: all cores.")
    report_to: list[Literal["tensorboard", "wandb", "trackio"]] = Field(default_factory=list)
    model: ModelSection = Field(default_factory=ModelSection)
    tokenizer: TokenizerSection = Field(default_factory=TokenizerSection)
    data: DataSection
    reward: RewardSection = Field(default_factory=RewardSection)
    stages: list[Stage] = Field(min_length=1)

    @model_validator(mode="after")
    def _own_rewards_read_their_own_golds(self) -> Recipe:
        if self.reward.kind not in ("auto", "math"):
            self.data.check_golds = False  # what a gold must look like is then the reward function's business
        return self

    @model_validator(mode="after")
    def _unique_names(self) -> Recipe:
        names = [stage.name for stage in self.stages]
        for name in names:
            if names.count(name) > 1:
                count = names.count(name)
                raise ValueError(f"stages: the name {name!r} stands {count} times; give each its own `name`")
        return self
