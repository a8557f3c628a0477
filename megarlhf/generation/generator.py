"""Responses sampled by the trainer itself: no second framework whose numbers could differ."""

from __future__ import annotations

import contextlib
import functools
from collections import deque
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from megarlhf.batch import Prompts, Rollouts
from megarlhf.generation.cache import SlotCache, bytes_per_slot
from megarlhf.generation.in_flight import Answers, Listener, PassInFlight, RowsInFlight
from megarlhf.generation.repeated_steps import Capture, Choose, CudaGraphs, RepeatedSteps
from megarlhf.generation.sampling import Sampling, sample_tokens
from megarlhf.generation.schedule import Slots, WaitingRow, dealt, level, slots_within
from megarlhf.models.architecture import Architecture
from megarlhf.models.decoding import packed_forward
from megarlhf.models.parameters import kv_heads_per_rank
from megarlhf.models.transformer import DTYPES, Transformer, sequence_parallel_off
from megarlhf.parallel.collectives import gather_rows, of_every_copy
from megarlhf.parallel.groups import ModelGroups
from megarlhf.parallel.pipeline import StageMessages

STEPS_BETWEEN_LOOKS = 8
"""Steps after which the host looks for rows that have ended, where looking makes a device wait; on a CPU it is each step."""
STEPS_BETWEEN_LEVELLINGS = 32
"""Steps after which copies of a model, while rows wait for slots, tell each other how many they have and share out those that wait."""


class Generator:
    """Samples from a model in its own layout, with a key-value cache, under tensor and pipeline parallelism."""

    def __init__(
        self,
        chunks: Sequence[Transformer],
        groups: ModelGroups,
        *,
        architecture: Architecture,
        eos_id: int,
        pad_id: int,
        stop_ids: Sequence[int] = (),
        check_weights: Callable[[], None] | None = None,
    ) -> None:
        """Responses end after EOS, which finishes them, or after any of `stop_ids`.

        `check_weights` is called before anything is generated; it raises where the weights are not those to sample from.
        """
        self.chunks = list(chunks)
        self.groups = groups
        self.architecture = architecture
        self.eos_id = eos_id
        self.pad_id = pad_id
        self.check_weights = check_weights
        self.make_capture: Callable[[], Capture] = CudaGraphs
        """What `cuda_graphs` captures steps with."""
        self.last_ids = frozenset((eos_id, *stop_ids))

    @torch.no_grad()
    def generate(
        self,
        prompts: Prompts,
        *,
        max_new_tokens: int | Sequence[int],
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int,
        iteration: int,
        max_batch_size: int | None = None,
        kv_cache_bytes: int | None = None,
        cuda_graphs: bool = False,
        listener: Listener | None = None,
    ) -> Rollouts:
        """One response to each prompt: up to EOS or a stop id (included), max_new_tokens (of all rows, or of each), or the model's context.

        Every rank passes the same prompts and gets the same rollouts. Each data-parallel copy answers its share: at most
        max_batch_size rows at a time, and no more than kv_cache_bytes of each of its ranks hold; a row enters where another has
        ended. Log-probabilities are those of softmax(logits / temperature) over the whole vocabulary, whatever top_k and top_p leave
        out; at temperature 0 those at temperature 1. With `cuda_graphs` steps that only decode are captured once per call and size of
        batch, and repeated. `listener` may be given on some ranks only; what it raises ends the call.

        ValueError when a prompt leaves no room in the context, or kv_cache_bytes hold not one row.
        """
        if self.check_weights is not None:
            self.check_weights()
        longest, context = int(prompts.lengths.max()), self.architecture.max_seq_len
        if longest >= context:
            raise ValueError(f"a prompt of {longest} tokens leaves no room in a context of {context}")
        sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
        most_new = [max_new_tokens] * prompts.num_rows if isinstance(max_new_tokens, int) else list(max_new_tokens)
        rows = _waiting_rows(prompts, most_new, context)
        hands = dealt(rows, self.groups.layout.dp)
        capacity = max(row.length + row.limit for row in rows)
        most = max(map(len, hands))
        slots = slots_within(kv_cache_bytes, self.bytes_per_slot(capacity), wanted=min(most, max_batch_size or most), capacity=capacity)
        waiting, answers = [deque(hand) for hand in hands], Answers(self.last_ids, listener)
        if listener is not None:
            listener.expect(len(waiting[self.groups.coordinates.dp]))
        with self._generating():
            flights = self._flights(prompts, waiting[self.groups.coordinates.dp], slots, capacity, answers)
            choose = functools.partial(self._choose, sampling, seed=seed, iteration=iteration)
            if cuda_graphs:
                self._repeat_steps(flights, choose)
            self._fly(flights, choose, waiting if most > slots else None, answers)
        return self._rollouts(prompts, sorted(answers.tokens), answers, max(most_new))

    def bytes_per_slot(self, capacity: int) -> int:
        """Bytes that a row of `capacity` tokens takes of kv_cache_bytes."""
        return bytes_per_slot(self.architecture, self.groups.layout, self._dtype, capacity)

    @property
    def precision(self) -> str:
        """Of the weights: fp32, bf16 or fp16."""
        return next(name for name, dtype in DTYPES.items() if dtype == self._dtype)

    @property
    def _dtype(self) -> torch.dtype:
        return next(self.chunks[0].parameters()).dtype

    @contextlib.contextmanager
    def _generating(self) -> Iterator[None]:
        """Dropout and sequence parallelism off, and as before after."""
        modes = [chunk.training for chunk in self.chunks]
        for chunk in self.chunks:
            chunk.eval()
        try:
            with sequence_parallel_off(self.chunks):
                yield
        finally:
            for chunk, mode in zip(self.chunks, modes, strict=True):
                chunk.train(mode)

    def _flights(self, prompts: Prompts, waiting: deque[WaitingRow], slots: int, capacity: int, answers: Answers) -> list[RowsInFlight]:
        """As many groups of rows as there are stages, so that every stage has one to work on."""
        num_groups = min(self.groups.layout.pp, slots)
        sizes = [len(range(number, slots, num_groups)) for number in range(num_groups)]
        looks = 1 if self.groups.device.type == "cpu" else STEPS_BETWEEN_LOOKS
        return [
            RowsInFlight(Slots(waiting, size), self._cache(size, capacity), prompts, answers, steps_between_looks=looks) for size in sizes
        ]

    def _repeat_steps(self, flights: Sequence[RowsInFlight], choose: Choose) -> None:
        capture, size = self.make_capture(), self.architecture.hidden_size
        for rows in flights:
            rows.repeated = [RepeatedSteps(chunk, rows.cache, choose, hidden_size=size, capture=capture) for chunk in self.chunks]

    def _cache(self, slots: int, capacity: int) -> SlotCache:
        kv_heads, tp = kv_heads_per_rank(self.architecture, self.groups.layout.tp), self.groups.layout.tp
        return SlotCache(
            [layer.layer_number for chunk in self.chunks for layer in chunk.decoder.layers],
            slots=slots,
            kv_heads=kv_heads,
            group=self.architecture.num_heads // tp // kv_heads,
            capacity=capacity,
            head_size=self.architecture.head_size,
            dtype=self._dtype,
            device=self.groups.device,
        )

    def _fly(
        self, flights: Sequence[RowsInFlight], choose: Choose, waiting: Sequence[deque[WaitingRow]] | None, answers: Answers
    ) -> None:
        """Group after group through the stages until no row is left; each stage takes the same passes in the same order.

        While the last stage has one group, the stages before have the others: a group's tokens are back when its turn comes.
        `waiting`: of each copy, the rows that have no slot yet; None where every row has one.
        """
        messages, layout, rounds = StageMessages(self.groups), self.groups.layout, 0
        is_shared = waiting is not None and layout.dp > 1
        while (is_active := any(rows.is_active for rows in flights)) or is_shared:
            rounds += 1
            if is_shared and rounds % STEPS_BETWEEN_LEVELLINGS == 0:
                is_shared = self._level(flights, waiting, answers)
            if not is_active:
                continue
            passes = []
            for rows in flights:
                self._hear(rows, messages)
                for flying in rows.next_passes():
                    self._run(flying, 0, messages, choose)
                    passes.append(flying)
            for number in range(1, layout.virtual_pp):
                for flying in passes:
                    self._run(flying, number, messages, choose)
        messages.finish()

    def _level(self, flights: Sequence[RowsInFlight], waiting: Sequence[deque[WaitingRow]], answers: Answers) -> bool:
        """Share out the rows that wait over the copies, by how many each has left; whether any wait.

        Copies get here after as many steps, not after as much time, so that who answers a row is the same in every run.
        """
        copy = self.groups.coordinates.dp
        counts = of_every_copy((sum(len(rows.slots.held) for rows in flights), len(waiting[copy])), self.groups)
        for queue, (_, left) in zip(waiting, counts, strict=True):
            while len(queue) > left:
                queue.popleft()
        level([held for held, _ in counts], waiting)
        if answers.listener is not None:
            answers.listener.expect(len(answers.ended) + counts[copy][0] + len(waiting[copy]))
        return any(waiting)

    def _hear(self, rows: RowsInFlight, messages: StageMessages) -> None:
        """Be told the tokens that the last stage has chosen: by it on the first stage, elsewhere by the stage before."""
        stage, last = self.groups.coordinates.pp, self.groups.layout.pp - 1
        if stage == last or not rows.awaited:
            return
        tokens = messages.receive((rows.awaited,), torch.int64, stage - 1 if stage else last)
        if stage + 1 < last:
            messages.send(tokens, stage + 1)
        rows.take(tokens, None)

    def _run(self, flying: PassInFlight, number: int, messages: StageMessages, choose: Choose) -> None:
        """One pass through this stage's chunk `number`."""
        layout, stage, chunk = self.groups.layout, self.groups.coordinates.pp, self.chunks[number]
        hidden = None
        if stage or number:
            shape = (flying.plan.tokens, self.architecture.hidden_size)
            hidden = messages.receive(shape, self._dtype, (stage - 1) % layout.pp)
        plan, repeated = flying.plan, flying.rows.repeated
        if repeated and plan.only_decodes:
            found = repeated[number](flying.tokens, flying.positions, flying.samples, hidden, max(flying.on_host) + 1)
        else:
            flying.begin()
            n = plan.decoded
            hidden = packed_forward(chunk, flying.tokens, flying.positions, hidden, flying.rows.cache, wanted=n)
            found = choose(hidden, flying.samples, flying.positions[:n] + 1) if chunk.post_process and n else (hidden,)
        if not chunk.post_process:
            messages.send(found[0], (stage + 1) % layout.pp)
        elif plan.decoded:
            tokens, logprobs = found
            flying.rows.take(tokens, logprobs)
            if layout.pp > 1:
                messages.send(tokens, 0)

    def _choose(
        self, sampling: Sampling, hidden: Tensor, samples: Tensor, positions: Tensor, *, seed: int, iteration: int
    ) -> tuple[Tensor, Tensor]:
        """The next token [rows] and its log-probability [rows] from hidden states [rows, h]."""
        return sample_tokens(
            self.chunks[-1].logits(hidden),
            sampling,
            vocab_size=self.architecture.vocab_size,
            tp=self.groups.tp,
            seed=seed,
            iteration=iteration,
            samples=samples,
            positions=positions,
        )

    def _rollouts(self, prompts: Prompts, mine: list[int], answers: Answers, max_new: int) -> Rollouts:
        """Every copy's answers together on the host, appended to the prompts."""
        device = self.groups.device
        mine = mine if self.groups.is_last_stage else []
        index = torch.tensor(mine, dtype=torch.int64, device=device)

        def everywhere(rows: Tensor) -> Tensor:
            return gather_rows(rows.to(device), index, prompts.num_rows, self.groups).cpu()

        given = [answers.tokens[row] for row in mine]
        responses = everywhere(_padded(given, max_new, torch.int64))
        logprobs = everywhere(_padded([answers.logprobs[row] for row in mine], max_new, torch.float32))
        new = everywhere(torch.tensor([len(tokens) for tokens in given], dtype=torch.int64))
        finished = everywhere(torch.tensor([tokens[-1] == self.eos_id for tokens in given], dtype=torch.int64)).bool()

        width = int((prompts.lengths + new).max())
        tokens = torch.full((prompts.num_rows, width), self.pad_id, dtype=torch.int64)
        shared = min(width, prompts.tokens.shape[1])
        tokens[:, :shared] = prompts.tokens[:, :shared]
        response_mask = torch.zeros(prompts.num_rows, width - 1, dtype=torch.bool)
        placed = torch.zeros(prompts.num_rows, width - 1)
        at = torch.arange(max_new)
        real = at[None] < new[:, None]  # [batch, max_new]
        row, column = real.nonzero(as_tuple=True)
        position = prompts.lengths[row] + column
        tokens[row, position] = responses[row, column]
        response_mask[row, position - 1] = True
        placed[row, position - 1] = logprobs[row, column]
        return Rollouts(
            tokens=tokens,
            lengths=prompts.lengths + new,
            prompt_lengths=prompts.lengths,
            response_mask=response_mask,
            logprobs=placed,
            finished=finished,
        )


def _padded(rows: Sequence[Sequence[float]], width: int, dtype: torch.dtype) -> Tensor:
    """Ragged rows as [n, width], zeros after each."""
    whole = torch.zeros(len(rows), width, dtype=dtype)
    for row, values in zip(whole, rows, strict=True):
        row[: len(values)] = torch.tensor(values, dtype=dtype)
    return whole


def _waiting_rows(prompts: Prompts, max_new: Sequence[int], context: int) -> list[WaitingRow]:
    """The rows of a batch; those with the same tokens have the same prompt's number."""
    numbers: dict[bytes, int] = {}
    rows = []
    for number, (length, most) in enumerate(zip(prompts.lengths.tolist(), max_new, strict=True)):
        prompt = numbers.setdefault(prompts.tokens[number, :length].numpy().tobytes(), len(numbers))
        rows.append(WaitingRow(number, prompt, length, min(most, context - length)))
    return rows
