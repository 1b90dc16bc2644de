"""Rollout engines that go wrong on purpose, for tests of the pool. They run inside real Ray workers.

`engine_args` holds {"marks": folder, ...}. A fault strikes `times` times in the whole pool (default 1): each strike
leaves a mark in that folder, which the replacement worker sees.
"""

import os
import time
from pathlib import Path

import torch

from kimi_rl.rollout.engine import Completion
from kimi_rl.rollout.transformers_engine import TransformersEngine
from kimi_rl.weight_sync import checksum_all


def strike(marks, name, times=1) -> bool:
    """Whether a fault strikes now: True `times` times for each name, whichever worker asks. One step for the OS."""
    for i in range(times):
        try:
            os.close(os.open(Path(marks) / f"{name}{i}", os.O_CREAT | os.O_EXCL))
            return True
        except FileExistsError:
            continue
    return False


class Stub:
    """Serves tensors "a" and "b" without a model. The tokens of a completion are those of its prompt, seed first."""

    def __init__(self, model_folder, *, batch_size, device, engine_args):
        self.arguments = engine_args
        self.policy_version = -1
        self.held = {"a": torch.zeros(3), "b": torch.zeros(2)}
        self.refusing = False
        self.start()

    def start(self):
        """Runs at the end of the constructor."""

    def strikes(self, name="strike") -> bool:
        return strike(self.arguments["marks"], name, self.arguments.get("times", 1))

    def begin_update(self):
        self.refusing = True

    def load_weights(self, weights):
        for name, tensor in weights:
            self.held[name] = tensor.clone()

    def checksums(self):
        return checksum_all(self.held.items())

    def finish_update(self, version):
        self.policy_version, self.refusing = version, False

    def generate(self, requests, params):
        if self.refusing:
            raise RuntimeError("incomplete weight update")
        logprob = float(self.held["a"][0])  # so that a test sees which weights answered
        return [
            Completion([r.seed, *r.prompt_ids], [logprob] * (1 + len(r.prompt_ids)), "length", self.policy_version)
            for r in requests
        ]

    def close(self):
        pass


class Counts(Stub):
    """Goes on counting from the last token of the prompt, one token every `delay` seconds, up to `last`."""

    def generate(self, requests, params):
        if self.refusing:
            raise RuntimeError("incomplete weight update")
        time.sleep(self.arguments["delay"] * params.max_tokens)
        logprob, last = float(self.held["a"][0]), self.arguments["last"]
        answers = []
        for request in requests:
            first = request.prompt_ids[-1] + 1
            tokens = list(range(first, min(first + params.max_tokens, last + 1)))
            reason = "stop" if tokens[-1] == last else "length"
            answers.append(Completion(tokens, [logprob] * len(tokens), reason, self.policy_version))
        return answers


class Hangs(Stub):
    def generate(self, requests, params):
        if self.strikes():
            time.sleep(3600)
        return super().generate(requests, params)


class Dies(Stub):
    """Its process ends in the middle of a call, as if killed."""

    def generate(self, requests, params):
        if self.strikes():
            os.kill(os.getpid(), 9)
        return super().generate(requests, params)


class AnswersStale(Stub):
    """An engine that thinks itself current and is not: the version in its answers is the one before."""

    def generate(self, requests, params):
        self.policy_version -= (stale := self.strikes())
        answers = super().generate(requests, params)
        self.policy_version += stale
        return answers


class AnswersTooFew(Stub):
    def generate(self, requests, params):
        return super().generate(requests[1:] if self.strikes() else requests, params)


class HangsInUpdate(Stub):
    def load_weights(self, weights):
        if self.policy_version == 0 and self.strikes():
            time.sleep(3600)
        super().load_weights(weights)


class KeepsOldTensor(Stub):
    """Its loader drops one tensor of the second update without a word."""

    def load_weights(self, weights):
        drop = self.policy_version == 0 and self.strikes()
        super().load_weights((n, self.held[n] if drop and n == "b" else t) for n, t in weights)


class LosesLink(Stub):
    """One fault on the way from the learner for each of the versions 0 to 3, in whichever worker comes first."""

    def begin_update(self):
        super().begin_update()
        from kimi_rl.weight_sync import nccl

        version = self.policy_version + 1  # a worker that was just started takes any version as its first
        if version < 4 and self.strikes(f"version{version}_"):
            self.transfer = nccl._transfer
            fault = [self.dies, self.dies, self.hangs, self.damages][version]
            setattr(nccl, "_transfer" if version else "_join", fault)

    @staticmethod
    def dies(*_, **__):
        os.kill(os.getpid(), 9)

    @staticmethod
    def hangs(*_):
        time.sleep(3600)

    def damages(self, group, buffer, line):
        self.transfer(group, buffer, line)
        buffer[0] += 1


class CannotStart(Stub):
    def start(self):
        if self.strikes():
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


class DiesAtStart(Stub):
    def start(self):
        if self.strikes():
            os._exit(1)


class HangsAtStart(Stub):
    def start(self):
        if self.strikes():
            time.sleep(3600)


class RefusesArguments(Stub):
    def start(self):
        from kimi_rl.errors import InputError

        raise InputError("rollout.engine_args.oops: unknown")


class RealHalfUpdate(TransformersEngine):
    """The true engine; its second update breaks off after a few layers."""

    def __init__(self, model_folder, *, batch_size, device, engine_args):
        super().__init__(model_folder, batch_size=batch_size, device=device)
        self.marks = engine_args["marks"]

    def load_weights(self, weights):
        if self.policy_version == 0 and strike(self.marks, "half"):
            weights = self.broken_off(weights)
        super().load_weights(weights)

    @staticmethod
    def broken_off(weights):
        for index, item in enumerate(weights):
            if index == 40:
                raise ConnectionError("the sender went away")
            yield item


class RealDies(TransformersEngine):
    """The true engine, killed between two tokens of its first chunk."""

    def __init__(self, model_folder, *, batch_size, device, engine_args):
        super().__init__(model_folder, batch_size=batch_size, device=device)
        marks, calls = engine_args["marks"], []
        forward = self.model.forward

        def count(*args, **kwargs):
            calls.append(1)
            if len(calls) == 5 and strike(marks, "died"):
                os.kill(os.getpid(), 9)
            return forward(*args, **kwargs)

        self.model.forward = count
