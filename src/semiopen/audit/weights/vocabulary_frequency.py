"""Which token stands at each place of a shuffled vocabulary: from what is generated, from known text, from a relative.

The host holds the projection with its rows shuffled and sees the places of the tokens that are drawn. Whoever may also
read the text that comes out learns a place with each new token and needs none of this.

Legend: V vocabulary.
"""

from collections.abc import Callable, Iterable, Mapping

import torch

from semiopen.audit.thief import upper_part
from semiopen.audit.victim import Victim
from semiopen.audit.weights.finding import Finding
from semiopen.audit.weights.key import assign
from semiopen.audit.weights.layout import HEAD, NORM, fold_gains

Reveal = Callable[[torch.Tensor], torch.Tensor]

_ROUNDS = 25
_BATCH = 16


def by_frequency(victim: Victim, drawn: torch.Tensor, public: torch.Tensor) -> Finding:
    """From generated places alone and text of the same kind: frequencies first, then pairs of neighbours.

    Args:
        victim: its projection is put in order.
        drawn: [N, T] places that the running system drew, in the order it drew them.
        public: [M, T] token ids of other texts.
    """
    vocabulary = victim.config.vocab_size
    pairs, known = _pairs(drawn, vocabulary), _pairs(public, vocabulary)
    ours, theirs = pairs.sum(0), known.sum(0)
    words = torch.empty(vocabulary, dtype=torch.int64)
    words[ours.argsort(descending=True, stable=True)] = theirs.argsort(descending=True, stable=True)
    # Expected from frequencies alone, so that a pair never seen in few texts is not impossible.
    expected = theirs[:, None] * theirs / theirs.sum().clamp(min=1)
    likely = (known + 0.1 * expected + 1e-3).log()
    likely = likely - likely.logsumexp(1, keepdim=True)
    for _ in range(_ROUNDS):
        arranged = likely[:, words]
        fitting = assign(arranged @ pairs.T + likely[words].T @ pairs)
        if bool((fitting == words).all()):
            break
        words = fitting
    return _finding(victim, "vocabulary_frequency", 0, words)


def by_predictions(victim: Victim, known: torch.Tensor) -> Finding:
    """Feed text that one knows and see which place is likely before each token: the likeliest order of all.

    Args:
        victim: its head is open and shuffled.
        known: [N, T] token ids.
    """
    parts = ((victim.query(part)[:, :-1], part[:, 1:]) for part in known.split(_BATCH))
    return _finding(victim, "vocabulary_predictions", known.numel(), _likeliest_order(victim, parts))


def by_naming(victim: Victim, states: torch.Tensor, most: int, reveal: Reveal) -> Finding:
    """Have the enclave name the words at those places that are likeliest over many states.

    Args:
        victim: its head is open and shuffled.
        states: [N, T, H] that the sealed layers gave out.
        most: how many words to have named; the others are put at the places left, in any order.
        reveal: places [C] int64 -> words [C] int64, as whoever reads the text that comes out is told them.
    """
    upper, use = upper_part(victim), torch.zeros(victim.config.vocab_size, dtype=torch.float64)
    with torch.inference_mode():
        for part in states.split(_BATCH):
            use += upper(part).softmax(-1).flatten(0, 1).double().sum(0)
    order = use.argsort(descending=True)
    asked, others = order[:most], order[most:]
    words = torch.full_like(order, -1)
    words[asked] = reveal(asked)
    left = torch.ones_like(order, dtype=torch.bool)
    left[words[asked]] = False
    words[others] = left.nonzero()[:, 0]
    return _finding(victim, "vocabulary_naming", 0, words)


def _likeliest_order(victim: Victim, parts: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    """[V] int64, from states [N, T, H] of the sealed layers and the words [N, T] that followed them."""
    vocabulary = victim.config.vocab_size
    upper, evidence = upper_part(victim), torch.zeros(vocabulary, vocabulary, dtype=torch.float64)
    for states, following in parts:
        with torch.inference_mode():
            said = upper(states).log_softmax(-1).flatten(0, 1).double()
        evidence.index_add_(0, following.flatten(), said)
    return assign(evidence)


def by_rows(victim: Victim, relative: Mapping[str, torch.Tensor], rotation: torch.Tensor) -> Finding:
    """Match rows to those of a relative's projection, in a basis that another attack found."""
    ours = fold_gains({name: relative[name] for name in (HEAD, NORM)})[HEAD] @ rotation
    theirs = fold_gains({name: victim.open_tensors[name] for name in (HEAD, NORM)})[HEAD]
    words = assign(torch.nn.functional.normalize(ours) @ torch.nn.functional.normalize(theirs).T)
    return _finding(victim, "vocabulary_rows", 0, words)


def mapped(words: torch.Tensor, true: torch.Tensor, drawn: torch.Tensor) -> dict[str, float]:
    """Share of the vocabulary at its place, and weighted by how often each place was drawn."""
    right = (words == true).double()
    use = drawn.flatten().bincount(minlength=len(true)).double()
    return {"mapped": float(right.mean()), "mapped_by_use": float((right * use).sum() / use.sum())}


def _pairs(ids: torch.Tensor, vocabulary: int) -> torch.Tensor:
    """[V, V] fp64: how often one follows the other."""
    places = ids[:, :-1] * vocabulary + ids[:, 1:]
    return places.flatten().bincount(minlength=vocabulary**2).view(vocabulary, vocabulary).double()


def _finding(victim: Victim, attack: str, tokens: int, words: torch.Tensor) -> Finding:
    shuffled = victim.open_tensors[HEAD]
    head = torch.empty_like(shuffled)
    head[words] = shuffled
    return Finding(attack, tokens, tensors={HEAD: head}, words=words)
