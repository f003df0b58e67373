"""One trial in its process: the commands of its training, and of the inference that follows it.

What a command measures depends on what the request asks for: an isolated trial times its adapter merged, and one that
takes turns with others its warm requests.
"""

from __future__ import annotations

from pathlib import Path

from lorameter.errors import LorameterError
from lorameter.records.record import Failure, PartialRecord
from lorameter.studies.request import TrialRequest
from lorameter.trial.building import peft_methods
from lorameter.trial.building.packing import is_packed, unpack_4bit
from lorameter.trial.building.shared import SharedBase
from lorameter.trial.process import release_unused
from lorameter.trial.serving.server import Server, check_adapters, check_attention
from lorameter.trial.training import Training


class Trial(Training):
    """A trial whose training is followed by requests."""

    def __init__(self, request: TrialRequest, shared: SharedBase) -> None:
        super().__init__(request, shared)
        self._server: Server | None = None

    def save_adapter(self) -> PartialRecord:
        """Write the trained adapter where a new interpreter will load it from."""
        initial = self._initial if self._request.variant.rewrites_base else None
        peft_methods.save(self._built.trainee.model, Path(self._request.scratch) / "adapter", initial=initial)
        return PartialRecord()

    def begin_generate(self) -> PartialRecord:
        """First call and the discarded requests after it. Training has ended: the optimizer's state is let go."""
        trainee, protocol = self._built.trainee, self._request.protocol
        trainee.model.eval()
        if self._request.variant.merge_adapter:
            peft_methods.merge(trainee.model)
        trainee.optimizer.state.clear()  # a server holds none, so it is not in the peak
        release_unused(self._request.device)
        if self._sees_peaks:
            self._gauge.begin()
        self._server = Server(trainee.model, trainee.adapter, self._built.stream, self._request)
        first = self._server.warm_up(1 + protocol.generate_warmup)
        values = {
            "new_tokens": float(self._request.workload.new_tokens),
            "request_batch": float(self._request.workload.request_batch),
        }
        values["packed_4bit_decode"] = float(is_packed(trainee.model))
        if self._alone:
            values["first_call_time_s"] = first.request_time_s
        if "open_ended" in self._request.measures and self._request.device.startswith("cuda"):
            self._server.visit(protocol.open_ended_requests)
        fragment = PartialRecord(values=values, tokens={"completion": list(first.tokens)})
        if not self._sees_peaks:
            fragment = check_attention(fragment, trainee.model, self._server, self._request)
        return check_adapters(fragment, self._server, self._request)

    def request(self) -> PartialRecord:
        """One warm request, with the unmerged adapter or, after `merge`, the merged one."""
        return PartialRecord(samples=self._serving.request())

    def open_ended(self) -> PartialRecord:
        """One request that the model ends itself; its answer goes into the record."""
        index, request = self._serving.open_ended()
        samples: dict[str, tuple[float, ...]] = {
            "open_ended_request_time_s": (request.request_time_s,),
            "open_ended_first_token_time_s": (request.first_token_time_s,),
            "open_ended_tokens": (float(len(request.tokens)),),
        }
        return PartialRecord(samples=samples, tokens={f"answer_{index}": list(request.tokens)})

    def base_answers(self) -> PartialRecord:
        """The answers to the same prompts before training: those of the base without an adapter."""
        if self._request.variant.rewrites_base or self._request.variant.merge_adapter:
            return PartialRecord()

        def answers() -> dict[str, list[int]]:
            with peft_methods.without_adapter(self._built.trainee.model):
                return {f"base_answer_{index}": list(server.answer(index).tokens) for index in server.answered}

        server = self._serving
        return PartialRecord(tokens=self.shared.once("answers", answers))

    def end_generate(self) -> PartialRecord:
        """Peaks of generation."""
        if not self._sees_peaks:
            return PartialRecord()
        fragment = PartialRecord(memory=self._gauge.peaks("generate"))  # of which what a profile keeps is no part
        return check_attention(fragment, self._built.trainee.model, self._serving, self._request)

    def merge(self) -> PartialRecord:
        """Merge the adapter into the base and warm up again. Ends the trial: the base is changed."""
        self._serving.merge(discard=1 + self._request.protocol.generate_warmup)
        return PartialRecord()

    def close(self) -> PartialRecord:
        """The last word of a trial on a base that others share: the base must be what it was."""
        unpack_4bit(self._built.trainee.model)
        if self.shared.unchanged():
            return PartialRecord()
        message = "the base's weights changed while trials shared it, so none of them is what it would be alone"
        return PartialRecord().failed("invalid", Failure(phase="close", kind="BaseChanged", message=message))

    @property
    def _serving(self) -> Server:
        if self._server is None:
            raise LorameterError(f"trial {self._request.trial}: asked for a request before generation began")
        return self._server
