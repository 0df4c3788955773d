"""Finds the original's tensors in somebody else's model, by name.

`NAMES` goes from Hugging Face's names to theirs, by part or in full:

    NAMES = {
        "layers": "blocks",                                # by part
        "self_attn.q_proj": "attn.wq",                     # several parts
        ("q_proj", "k_proj", "v_proj"): "qkv",             # one tensor has the rows of all three
        "down_proj": ("w2", "transposed"),                 # stored as (inputs, outputs)
        "model.norm.weight": "final_scale",                # in full
    }

`model.` at the start of a name may be left out, on both sides.
"""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
GROUPS = (("q_proj", "k_proj", "v_proj"), ("k_proj", "v_proj"), ("gate_proj", "up_proj"))


@dataclass(frozen=True)
class Rule:
    """An entry of NAMES, for one of Hugging Face's names: parts of a name become other parts."""

    parts: tuple[str, ...]
    theirs: tuple[str, ...]
    group: tuple[tuple[str, ...], ...]  # the names whose tensors are in one; mostly one name
    transposed: bool

    def replaced(self, name: str, parts: tuple[str, ...]) -> str:
        """The name with these parts instead of the rule's."""
        return f".{name}.".replace(f".{'.'.join(self.parts)}.", f".{'.'.join(parts)}.")[1:-1]


@dataclass(frozen=True)
class Slot:
    """Where a tensor of the original is in a model."""

    name: str  # of the parameter
    start: int = 0  # its first row, and their number, if the parameter has other tensors too
    rows: int | None = None
    transposed: bool = False

    def view(self, parameter: Tensor) -> Tensor:
        """The part of a parameter, or of its gradient, in the original's layout."""
        parameter = parameter.T if self.transposed else parameter
        return parameter if self.rows is None else parameter[self.start : self.start + self.rows]


@dataclass
class Match:
    """The result of `match_names`."""

    slots: dict[str, list[Slot]] = field(default_factory=dict)  # two: also in an untied head
    missing: list[str] = field(default_factory=list)  # of the original
    extra: list[str] = field(default_factory=list)  # of the model
    wrong: list[str] = field(default_factory=list)  # sentences on shapes and NAMES
    head: str = ""

    @property
    def problems(self) -> list[str]:
        """All of them as lines; the layers of equal ones are counted."""
        lists = (("missing", self.missing), ("extra", self.extra), ("", self.wrong))
        counts = Counter(
            f"{kind} {re.sub(r'[.]([0-9]+)[.]', '.N.', name)}".strip()
            for kind, names in lists
            for name in names
        )
        return [f"{line} ({n} times)" if n > 1 else line for line, n in counts.items()]


def parse_names(names: Mapping) -> list[Rule]:
    """The rules of NAMES, those with more parts first. Raises ValueError for a wrong entry."""
    rules = []
    for key, value in names.items():
        group = tuple(tuple(name.split(".")) for name in ((key,) if isinstance(key, str) else key))
        theirs, *options = value if isinstance(value, (tuple, list)) else (value,)
        if not isinstance(theirs, str) or options not in ([], ["transposed"]):
            raise ValueError(f"NAMES[{key!r}] is {value!r}, not a name or (name, 'transposed')")
        parts = tuple(part for part in theirs.split(".") if part)
        rules += [Rule(one, parts, group, bool(options)) for one in group]
    return sorted(rules, key=lambda rule: -len(rule.parts))


def translate(name: str, rules: list[Rule]) -> tuple[str, list[Rule]]:
    """Their name for one of Hugging Face's, without `model.`, and the rules that were used."""
    parts, found, used = name.split("."), [], []
    while parts:
        rule = next((r for r in rules if tuple(parts[: len(r.parts)]) == r.parts), None)
        found += rule.theirs if rule else parts[:1]
        used += [rule] if rule else []
        parts = parts[len(rule.parts) if rule else 1 :]
    return ".".join(found).removeprefix("model."), used


def match_names(
    theirs: Mapping[str, Tensor], parameters: Mapping[str, Tensor], names: Mapping
) -> Match:
    """Finds each tensor of the original in a model's parameters, aliases of one tensor included.

    theirs: the original's, with Hugging Face's names. Raises ValueError if NAMES is malformed.
    """
    rules, match = parse_names(names), Match()
    own = {name.removeprefix("model."): name for name in parameters}
    unused, owner = set(rules), {}
    for name in theirs:
        found, used = translate(name, rules)
        unused -= set(used)
        if found not in own:
            match.missing.append(name)
            continue
        slot, problem = make_slot(name, own[found], parameters[own[found]], theirs, used)
        if problem:
            match.wrong.append(problem)
        place = id(parameters[slot.name]), slot.start
        if place in owner:
            match.wrong.append(f"{name} and {owner[place]} are both in {slot.name}")
        owner[place], match.slots[name] = name, [slot]
    if HEAD not in theirs and EMBEDDING in match.slots:
        unused -= match_head(match, own, parameters, rules)
    known = {id(parameters[slot.name]) for slots in match.slots.values() for slot in slots}
    match.extra = [name for name, tensor in parameters.items() if id(tensor) not in known]
    match.wrong += [f"no tensor has {'.'.join(r.parts)}, a key of NAMES" for r in unused]
    return match


def make_slot(
    name: str, found: str, parameter: Tensor, theirs: Mapping[str, Tensor], used: list[Rule]
) -> tuple[Slot, str]:
    """The slot of a tensor, and what is wrong with its shape."""
    shape, start, rows, whole = tuple(theirs[name].shape), 0, None, theirs[name].shape[0]
    transposed = any(rule.transposed for rule in used)
    for rule in used:
        if len(rule.group) > 1:
            members = [theirs.get(rule.replaced(name, other)) for other in rule.group]
            sizes = [0 if member is None else member.shape[0] for member in members]
            place = rule.group.index(rule.parts)
            start, rows, whole = sum(sizes[:place]), sizes[place], sum(sizes)
    expected = (whole, *shape[1:])
    actual = tuple(parameter.shape[::-1] if transposed else parameter.shape)
    problem = ""
    if actual != expected:
        problem = f"{found} has shape {tuple(parameter.shape)}, {name} needs "
        problem += f"{expected[::-1] if transposed else expected}"
        if actual == expected[::-1]:
            problem += ": the other way round"
    return Slot(found, start, rows, transposed), problem


def match_head(
    match: Match, own: Mapping[str, str], parameters: Mapping[str, Tensor], rules: list[Rule]
) -> set[Rule]:
    """Is the head tied, as in the original? An untied one gets a copy of the embedding."""
    found, used = translate(HEAD, rules)
    (embedding,) = match.slots[EMBEDDING]
    tied = [name for name, p in parameters.items() if p is parameters[embedding.name]]
    if found not in own or own[found] in tied:
        match.head = "the head is tied" if len(tied) > 1 else "the head has no tensor of its own"
    else:
        slot = Slot(own[found], transposed=any(rule.transposed for rule in used))
        head, same = (each.view(parameters[each.name]) for each in (slot, embedding))
        match.slots[EMBEDDING].append(slot)
        match.head = f"the head is NOT tied: a copy of the embedding, {head.numel()} numbers more"
        if head.shape != same.shape:
            match.wrong.append(f"{slot.name} does not have the shape of the embedding")
    return set(used)


@torch.no_grad()
def load(match: Match, theirs: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> None:
    """Copies the original's tensors into the parameters."""
    for name, slots in match.slots.items():
        for slot in slots:
            slot.view(parameters[slot.name]).copy_(theirs[name])


# --- suggestions ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kind:
    """Tensors with one shape that differ only in the layer's number."""

    stack: str | None  # the name before the number
    names: tuple[str, ...]  # the name after it; several for a group in one tensor
    shape: tuple[int, ...]
    count: int

    def fits(self, other: "Kind") -> bool:
        """Whether it is as often in a model, in layers or outside, and has the same size."""
        same_place = self.count == other.count and (self.stack is None) == (other.stack is None)
        return same_place and other.shape in (self.shape, self.shape[::-1])


def suggest_names(
    match: Match, theirs: Mapping[str, Tensor], parameters: Mapping[str, Tensor]
) -> dict:
    """A NAMES for what is missing: equal names, then equal shapes in their order. A guess."""
    wanted, offered, names = kinds(match.missing, theirs), kinds(match.extra, parameters), {}
    if HEAD not in theirs:  # it is tied there, but it may have a name here
        wanted.append(Kind(None, ("lm_head",), tuple(theirs[EMBEDDING].shape), 1))
    pairs = {a: b for a in wanted for b in offered if a.names == b.names and a.fits(b)}
    offered = [other for other in offered if other not in pairs.values()]
    for kind in with_groups([kind for kind in wanted if kind not in pairs], offered):
        if fitting := [other for other in offered if kind.fits(other)]:
            # the first of equals
            pairs[kind] = min(fitting, key=lambda other: other.shape != kind.shape)
            offered.remove(pairs[kind])
    for kind, found in pairs.items():
        if kind.stack != found.stack:
            names[kind.stack] = found.stack
        (name,), turned = found.names, found.shape != kind.shape
        if turned or kind.names != found.names:
            key = kind.names if len(kind.names) > 1 else kind.names[0]
            names[key] = (name, "transposed") if turned else name
    return names


def kinds(names: list[str], tensors: Mapping[str, Tensor]) -> list[Kind]:
    split = re.compile(r"(?:model[.])?(?:(.+?)[.][0-9]+[.])?(.+?)(?:[.]weight)?").fullmatch
    counts = Counter((*split(name).groups(), tuple(tensors[name].shape)) for name in names)
    return [Kind(stack, (name,), shape, n) for (stack, name, shape), n in counts.items()]


def with_groups(wanted: list[Kind], offered: list[Kind]) -> list[Kind]:
    """The wanted kinds; those that are offered in one tensor, not each alone, become one kind."""
    for group in GROUPS:
        members = [kind for part in group for kind in wanted if kind.names[0].endswith(part)]
        if len(members) == len(group):
            names = tuple(member.names[0] for member in members)
            rows, first = sum(member.shape[0] for member in members), members[0]
            fused = Kind(first.stack, names, (rows, *first.shape[1:]), first.count)
            needed, found = (sum(map(members[-1].fits, side)) for side in (wanted, offered))
            if any(map(fused.fits, offered)) and found < needed:
                wanted = [fused, *(kind for kind in wanted if kind not in members)]
    return wanted
