"""The ``Link`` slot: what is sent in one direction, and in which form."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Literal

from fedlora.core import tree as trees
from fedlora.core.component import MODEL_CONFIG, Whole, by_kind, dataclass
from fedlora.core.errors import ConfigError
from fedlora.core.schema import Schema
from fedlora.core.slots import Slot, kind_of
from fedlora.core.tree import Tree
from fedlora.transport import wire
from fedlora.transport.layout import Draw
from fedlora.transport.precision import BFloat16, Float16, Float32, Precision
from fedlora.transport.sparsify import Dense, Facts, RandomK, RankSlice, Sparsifier, Threshold, TopK
from fedlora.transport.uniform import Uniform
from fedlora.transport.wire import Form, Packet

if TYPE_CHECKING:
    AnySparsifier = Sparsifier
else:
    AnySparsifier = Annotated[Dense | TopK | RandomK | Threshold | RankSlice, Slot("sparsify", Sparsifier)]
"""The union of all sparsifiers, discriminated by ``kind``; add a new one to this line."""

SPARSIFIERS: dict[str, type[Sparsifier]] = by_kind(AnySparsifier)
"""The table of sparsifiers, by ``kind``."""

if TYPE_CHECKING:
    AnyPrecision = Precision
else:
    AnyPrecision = Annotated[Float32 | BFloat16 | Float16 | Uniform, Slot("precision", Precision)]
"""The union of all precisions, discriminated by ``kind``; add a new one to this line, and to ``wire``."""

PRECISIONS: dict[str, type[Precision]] = by_kind(AnyPrecision)
"""The table of precisions, by ``kind``."""


@dataclass(frozen=True, kw_only=True, config=MODEL_CONFIG)
class Stage:
    """A change to a link from a given round on; settings that are None stay as they were.

    Args:
        round: the first round of the phase to which this applies, from 0.
        sparsify: which entries are sent.
        precision: the number format of the entries sent.
        head_precision: the number format of the head's entries.
    """

    round: Whole
    sparsify: AnySparsifier | None = None
    precision: AnyPrecision | None = None
    head_precision: AnyPrecision | None = None


@dataclass(frozen=True, kw_only=True, config=MODEL_CONFIG)
class Link:
    """One direction of the exchange: which entries are sent, in which number format, and relative to which reference.

    Args:
        sparsify: which entries are sent; the others arrive as zero.
        precision: the number format of the entries sent.
        head_precision: the number format of the head's entries, if it differs.
        reference: what a zero stands for: the number zero, or the initial value that both ends hold (``init``). The
            caller subtracts the reference before ``thin`` and adds it after decoding.
        feedback: whether the sender uses error feedback: what one round lost is added to the next message.
        stages: changes that apply from given rounds on, in order.

    Raises:
        ConfigError: the stages are not in order, or a format has a code of another one.

    >>> from fedlora.core.schema import Leaf
    >>> Link(sparsify=TopK(density=0.5)).prepare({"a": torch.tensor([1.0, -2.0])}, Schema({"a": Leaf()}), round=0)
    {'a': tensor([ 0., -2.])}

    References:
        Seide et al., "1-bit stochastic gradient descent", Interspeech 2014; Karimireddy et al., "Error feedback fixes
        signSGD", arXiv 1901.09847: ``e' = x + e - C(x + e)``.
    """

    sparsify: AnySparsifier = Dense()
    precision: AnyPrecision = Float32()
    head_precision: AnyPrecision | None = None
    reference: Literal["zero", "init"] = "zero"
    feedback: bool = False
    stages: tuple[Stage, ...] = ()

    def __post_init__(self) -> None:
        starts = [stage.round for stage in self.stages]
        if starts != sorted(set(starts)):
            raise ConfigError(f"stages begin in rounds {starts}; name them in order, each round once")
        for form in self.precisions:
            if type(form) not in PRECISIONS.values() and not 128 <= form.code < 256:
                raise ConfigError(f"{kind_of(form)}.code = {form.code}: formats of your own have codes from 128 to 255")
        by_code = {form.code: form for form in self.precisions}
        for form in self.precisions:
            if type(other := by_code[form.code]) is not type(form):
                raise ConfigError(
                    f"{kind_of(form)} and {kind_of(other)} have the code {form.code}, by which a receiver tells "
                    "formats apart; give each a code of its own"
                )

    @property
    def facts(self) -> tuple[Facts, ...]:
        """The properties of its sparsifiers, including those of stages."""
        chosen = (self.sparsify, *(stage.sparsify for stage in self.stages))
        return tuple(each.facts for each in chosen if each is not None)

    @property
    def drops_entries(self) -> bool:
        """Whether any round drops entries."""
        return any(each.drops for each in self.facts)

    @property
    def slices_ranks(self) -> bool:
        """Whether it sends the first ranks, the same in every round, and drops nothing else."""
        facts = self.sparsify.facts
        return facts.slices_ranks and not facts.reads_values and not self.stages

    @property
    def rescales(self) -> bool:
        """Whether any round scales kept entries up to compensate for dropped ones."""
        return any(each.drops and each.unbiased for each in self.facts)

    @property
    def precisions(self) -> tuple[Precision, ...]:
        """Its number formats, including those of stages."""
        stages = (each for stage in self.stages for each in (stage.precision, stage.head_precision))
        return tuple(each for each in (self.precision, self.head_precision, *stages) if each is not None)

    @property
    def rounds_values(self) -> bool:
        """Whether any round rounds values."""
        return any(form.lossy for form in self.precisions)

    @property
    def lossy(self) -> bool:
        """Whether the decoded values may differ from the original ones."""
        return self.drops_entries or self.rounds_values

    def at(self, round: int) -> Stage:
        """The settings in effect in a round of the phase (0-based)."""
        sparsify, precision, head = self.sparsify, self.precision, self.head_precision
        for stage in self.stages:
            if stage.round <= round:
                sparsify = stage.sparsify or sparsify
                precision, head = stage.precision or precision, stage.head_precision or head
        return Stage(round=round, sparsify=sparsify, precision=precision, head_precision=head or precision)

    def thin(self, tree: Tree, schema: Schema, round: int, seed: int) -> Tree:
        """The tree with zeros for the entries that are not sent; the arguments are those of ``Sparsifier.choose``."""
        sparsify = self.at(round).sparsify
        return sparsify(tree, schema, round, seed) if sparsify else tree

    def encode(
        self,
        tree: Tree,
        schema: Schema,
        round: int,
        seed: int,
        others: Mapping[str, Tree] | None = None,
        reference: str = "zero",
        trees: bool = True,
    ) -> Packet:
        """Encodes a tree from ``thin`` as a message, rounding its values.

        Args:
            tree: float32 tensors of any shape; not modified.
            schema: the leaf of every name in ``tree``.
            round: 0-based number of the round.
            seed: the seed given to ``thin``.
            others: further parts, sent in float32.
            reference: what the tree is relative to.
            trees: whether the packet includes the trees that its receiver will decode.
        """
        stage = self.at(round)
        draw = None
        if isinstance(stage.sparsify, RandomK):
            draw = Draw(seed, stage.sparsify.counts(tree, schema))
        forms = {
            "adapter": Form(stage.precision or Float32(), seed, draw),
            "head": Form(stage.head_precision or Float32(), seed + 1, draw),
        }
        return wire.pack(schema.split(tree) | dict(others or {}), forms, reference, trees)

    def with_lost(self, tree: Tree, lost: Tree) -> Tree:
        """``tree`` plus what the previous message lost."""
        return trees.add(tree, lost) if lost else tree

    def lost(self, tree: Tree, packet: Packet, schema: Schema) -> Tree:
        """The error to carry into the next message: with ``feedback``, what ``packet`` lost of ``tree``."""
        return trees.subtract(tree, schema.join(packet.trees)) if self.feedback else {}

    def send(self, tree: Tree, schema: Schema, round: int, seed: int, reference: str = "zero") -> Packet:
        """``encode`` of ``thin``."""
        return self.encode(self.thin(tree, schema, round, seed), schema, round, seed, reference=reference)

    def prepare(self, tree: Tree, schema: Schema, round: int, seed: int = 0) -> Tree:
        """What the receiver will decode: the tree, sparsified and then rounded."""
        return schema.join(self.send(tree, schema, round, seed).trees)
