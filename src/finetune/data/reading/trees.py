"""Rows with one message each -> one record per path through their trees; a file is held in memory whole.

The messages of a tree need not stand together, so no record is known before the end of the file. Every message is on
the path of a record, or Skipped, or a Fault.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from finetune.data.reading.fields import Values, optional_text, text_of, value_of
from finetune.data.reading.filtering import unwanted
from finetune.data.record import Message, Role
from finetune.data.rows import Fault, Parsed, Place, RawRow, Row, Skipped, UnreadableRowError, build
from finetune.source_sections import Source

TREE_ROLES: dict[str, Role] = {
    "prompter": "user",
    "user": "user",
    "assistant": "assistant",
    "system": "system",
}


@dataclass(frozen=True, slots=True)
class Node:
    """One message: `rank` among its siblings, the lower the better.

    One that fails a filter, which `unwanted` names, is made the root of a tree of its own, and none of its other
    columns are read: it cuts off what is below it, wherever it stands.
    """

    place: Place
    original: bytes
    id: str
    parent: str | None
    tree: str
    role: Role
    text: str
    language: str
    rank: float
    unwanted: str | None

    def fault(self, reason: str, detail: str) -> Fault:
        """The message as a Fault."""
        return Fault(self.place, reason, detail, self.original)


Children = dict[str, list[Node]]


def read_trees(rows: Iterable[RawRow | Fault], source: Source) -> list[Row]:
    """The records, faults and skipped messages of a file, in the order of their places.

    A record's place is that of its last message. A filter comes before everything else, and cuts off the message and
    all below it. An orphan, whose parent is not in the file, and a cycle are Faults with all below them.
    """
    result: list[Row] = []
    nodes: dict[str, Node] = {}
    for row in rows:
        if isinstance(row, Fault):
            result.append(row)
            continue
        reason = unwanted(row.values, source.filters)
        try:
            node = _cut_node(row, source, reason) if reason else _node(row, source)
            if node.id in nodes:
                first = nodes[node.id].place.line
                raise UnreadableRowError("duplicate_message", f"message {node.id} is also on line {first}")
            nodes[node.id] = node
        except UnreadableRowError as fault:
            original = row.original_bytes()
            result.append(
                Skipped(row.place, reason) if reason else Fault(row.place, fault.reason, fault.detail, original)
            )
    children: Children = defaultdict(list)
    for node in nodes.values():
        if node.parent is not None:
            children[node.parent].append(node)
    result += _unrooted(nodes, children)
    for node in nodes.values():
        if node.parent is None:
            result += _tree_rows(node, children, source)
    return sorted(result, key=lambda row: row.place.line)


def _node(row: RawRow, source: Source) -> Node:
    values = row.values
    name = text_of(values, source, "role")
    if name not in TREE_ROLES:
        raise UnreadableRowError("unknown_role", f"role {name!r}, known are {', '.join(TREE_ROLES)}")
    identity = text_of(values, source, "message_id")
    return Node(
        place=row.place,
        original=row.original_bytes(),
        id=identity,
        parent=optional_text(values, source, "parent_id") or None,
        tree=optional_text(values, source, "tree") or identity,
        role=TREE_ROLES[name],
        text=text_of(values, source, "text"),
        language=optional_text(values, source, "language"),
        rank=_rank(values, source),
        unwanted=None,
    )


def _cut_node(row: RawRow, source: Source, reason: str) -> Node:
    identity = text_of(row.values, source, "message_id")
    return Node(row.place, b"", identity, None, identity, "user", "", "", float("inf"), reason)


def _rank(values: Values, source: Source) -> float:
    """The rank; a message without one comes after those with one, then the order of the file decides."""
    rank = value_of(values, source, "rank")
    if rank is None or rank == "":
        return float("inf")
    try:
        number = float(rank)
    except (TypeError, ValueError, OverflowError):
        number = float("nan")
    if not math.isfinite(number):
        raise UnreadableRowError("wrong_type", f"{source.column('rank')} must be a number, got {str(rank)[:60]!r}")
    return number


def _below(starts: Iterable[Node], children: Children) -> Iterator[Node]:
    """The nodes and all that hang from them, each parent before its children."""
    stack = list(starts)
    while stack:
        node = stack.pop()
        yield node
        stack.extend(children.get(node.id, ()))


def _unrooted(nodes: dict[str, Node], children: Children) -> list[Row]:
    rooted = {node.id for node in _below((node for node in nodes.values() if node.parent is None), children)}
    tops = [node for node in nodes.values() if node.parent is not None and node.parent not in nodes]
    orphans = {node.id: top for top in tops for node in _below([top], children)}
    faults: list[Row] = []
    for node in nodes.values():
        if node.id in orphans:
            top = orphans[node.id]
            faults.append(node.fault("orphan_message", f"the parent {top.parent} of {top.id} is not in the file"))
        elif node.id not in rooted:
            faults.append(node.fault("message_cycle", f"message {node.id} answers itself, by way of {node.parent}"))
    return faults


def _tree_rows(root: Node, children: Children, source: Source) -> Iterator[Row]:
    kept = {node.id: node for node in _below([root], children)}
    if root.unwanted:
        yield from (Skipped(node.place, root.unwanted) for node in kept.values())
        return
    ends = _all_ends(kept) if source.paths == "all" else _best_end(root, children)
    on_path: set[str] = set()
    for end in ends:
        path = _path_to(end, kept)
        on_path.update(node.id for node in path)
        yield _path_row(path, source)
    answered = {node.id for node in _with_answers(kept)}
    for node in kept.values():
        if node.id not in on_path:
            yield Skipped(node.place, "not_best_path" if node.id in answered else "no_answer")


def _with_answers(kept: dict[str, Node]) -> list[Node]:
    """The messages that are answers or have one below them."""
    found: dict[str, Node] = {}
    for node in kept.values():
        step: Node | None = node if node.role == "assistant" else None
        while step is not None and step.id not in found:
            found[step.id] = step
            step = kept.get(step.parent or "")
    return list(found.values())


def _best_end(root: Node, children: Children) -> list[Node]:
    """The last answer on the way down that takes the best-ranked message each time; none where there is no answer."""
    end: Node | None = None
    node: Node | None = root
    while node is not None:
        end = node if node.role == "assistant" else end
        node = min(children.get(node.id, ()), key=lambda child: (child.rank, child.place.line), default=None)
    return [] if end is None else [end]


def _all_ends(kept: dict[str, Node]) -> list[Node]:
    """Every answer with no answer below it."""
    inner = {node.parent for node in _with_answers(kept)}
    return [node for node in kept.values() if node.role == "assistant" and node.id not in inner]


def _path_to(end: Node, kept: dict[str, Node]) -> list[Node]:
    path, node = [], kept.get(end.id)
    while node is not None:
        path.append(node)
        node = kept.get(node.parent or "")
    return path[::-1]


def _path_row(path: list[Node], source: Source) -> Row:
    messages = tuple(Message(node.role, node.text) for node in path)
    tree, language = path[0].tree[: source.group_characters], path[0].language or None
    try:
        return Parsed(build(source, messages=messages, group=tree, language=language), path[-1].place)
    except UnreadableRowError as fault:
        return Fault(path[-1].place, fault.reason, fault.detail, b"".join(node.original for node in path))
