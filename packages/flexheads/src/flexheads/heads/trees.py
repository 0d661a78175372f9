"""The best tree over the words of a sentence, from the scores of single arcs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

ROOT = 0
"""The number of the node that every tree hangs on."""

Scores = Mapping[int, Mapping[int, float]]
"""The score of each arc: dependent, to head, to score."""


def best_tree(scores: Sequence[Sequence[float]], single_root: bool = True) -> list[int]:
    """The heads of the words in the tree with the largest sum of scores.

    Chu and Liu (1965), Edmonds (1967); a maximum spanning tree as in McDonald et al. (2005).

    Args:
        scores: For each word the score of each head, finite: first that of the root, then those of
            the words, its own included, which does not count. ``(words, words + 1)``.
        single_root: Whether exactly one word hangs on the root.

    Returns:
        The head of each word: 0 is the root, and words are counted from 1.
    """
    if not scores:
        return []
    # An arc from the root costs more than all others can give: the best tree has one alone.
    flat = [score for row in scores for score in row]
    price = (max(flat) - min(flat) + 1) * len(scores) if single_root else 0.0
    arcs = {
        word: {
            head: score - (price if head == ROOT else 0.0)
            for head, score in enumerate(row)
            if head != word
        }
        for word, row in enumerate(scores, 1)
    }
    heads = _best(arcs)
    return [heads[word] for word in sorted(heads)]


def _best(scores: Scores) -> dict[int, int]:
    """The head of each node: its best one, or where those form a cycle, the cycle as one node."""
    best = {node: max(heads, key=heads.__getitem__) for node, heads in scores.items()}
    cycle = _cycle(best)
    if not cycle:
        return best
    whole = max(scores) + 1
    contracted: dict[int, dict[int, float]] = {whole: {}}
    leaves: dict[int, int] = {}
    for node in scores.keys() - cycle:
        heads = scores[node]
        contracted[node] = {head: s for head, s in heads.items() if head not in cycle}
        if inside := cycle & heads.keys():
            leaves[node] = max(inside, key=heads.__getitem__)
            contracted[node][whole] = heads[leaves[node]]
    enters: dict[int, int] = {}
    for head in {h for node in cycle for h in scores[node]} - cycle:
        # What it gains to break the cycle there.
        gains = {n: scores[n][head] - scores[n][best[n]] for n in cycle if head in scores[n]}
        enters[head] = max(gains, key=gains.__getitem__)
        contracted[whole][head] = gains[enters[head]]
    found = _best(contracted)
    outer = found.pop(whole)
    found = {node: leaves[node] if head == whole else head for node, head in found.items()}
    return found | {node: best[node] for node in cycle} | {enters[outer]: outer}


def _cycle(heads: Mapping[int, int]) -> set[int]:
    """The nodes of one cycle; none where every node leads to the root."""
    done: set[int] = set()
    for start in heads:
        path: dict[int, None] = {}
        node = start
        while node in heads and node not in done and node not in path:
            path[node] = None
            node = heads[node]
        if node in path:
            nodes = list(path)
            return set(nodes[nodes.index(node) :])
        done |= path.keys()
    return set()
