"""Inversion: back through W_k and W_v to the normed state, then the word whose embedding is nearest.

After "Shadow in the Cache" (arXiv 2508.09442). It is meant for a cache right above the embedding: through sealed blocks
a state is no embedding any more.
"""

import torch
import torch.nn.functional as F

from semiopen.audit.kv.dump import Dump
from semiopen.audit.kv.projections import Projections
from semiopen.audit.kv.recovered import Recovered


def run(dump: Dump, projections: Projections, embedding: torch.Tensor) -> Recovered:
    """Attack.

    Args:
        dump: its first open block's cache is read.
        projections: of that block, as the thief knows them.
        embedding: [V, H], in the same basis.

    Returns:
        `fit`: mean cosine of the states to the words taken; 1 where the cache lies right above this embedding.
    """
    found = projections.back(dump.straight_keys(), dump.values[0].transpose(0, 1))
    alike = F.normalize(found) @ F.normalize(embedding.float()).T
    best, ids = alike.max(1)
    return Recovered.all_of("inversion", ids, fit=float(best.mean()))
