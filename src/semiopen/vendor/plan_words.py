"""What a plan found, in plain words."""

from collections.abc import Mapping

from semiopen.vendor.costs import Cost
from semiopen.vendor.plan_file import AttackReport, Difficulty, Start
from semiopen.vendor.recovery import Price

# Of a public base's layers in place of the sealed ones, without any query.
GRAFT_AGREEMENT = 0.8  # share of tokens right
GRAFT_LOSS = 0.05  # nats per token above the unharmed loss


def proposal(attack: AttackReport, prefix: int) -> int:
    """Token budget for the lease of a plan: what the attack needs at least, or all that was tried."""
    curve = next(curve for curve in attack.curves if curve.prefix == prefix)
    low = curve.price(attack.agreement).low
    return attack.budget_tokens if low is None else low


def findings(
    difficulties: Mapping[Start, Difficulty],
    attack: AttackReport | None,
    rule: int,
    prefix: int,
    num_layers: int,
) -> list[str]:
    """What was found, in sentences."""
    found = []
    for difficulty in difficulties.values():
        what = "fresh layers" if difficulty.start == "noise" else "the public base's layers"
        full = difficulty.at(num_layers).loss
        found.append(
            f"The paper's rule, with {what} in place of the sealed ones: {_blocks(difficulty.rule_prefix)} (loss "
            f"{difficulty.at(difficulty.rule_prefix).loss:.2f}, all sealed {full:.2f}, unharmed "
            f"{difficulty.unharmed_loss:.2f} nats per token)."
        )
    if attack is None:
        found.append(
            "No attack was run, so it is not known how many tokens this protects; give --attack-budget to find out."
        )
        return found
    for curve in attack.curves:
        price = curve.price(attack.agreement)
        found.append(
            f"The attack (SEM) gets {attack.agreement:.0%} of the tokens right with {_blocks(curve.prefix)} sealed "
            f"from {_price_in_words(price, attack.budget_tokens)}."
        )
    if attack.stands:
        found.append(
            f"{_blocks(prefix).capitalize()}: the attack did not get {attack.agreement:.0%} right from the "
            f"{attack.needed_tokens:,} tokens needed. Another attack may."
        )
    tried = [curve.prefix for curve in attack.curves]
    if rule != prefix:
        found.append(
            f"The rule says {_blocks(rule)}, the attack {_blocks(prefix)}; the attack decides, because the rule "
            "measures where a thief starts and the attack what the rest costs."
            + ("" if rule in tried else f" With {_blocks(rule)} no attack was run.")
        )
    elif attack.stands:
        found.append("The rule and the attack agree.")
    return found


def warnings(
    tied: bool,
    num_layers: int,
    difficulties: Mapping[Start, Difficulty],
    attack: AttackReport | None,
    prefix: int,
    cost: Cost,
    max_slowdown: float,
) -> list[str]:
    """What the vendor must not overlook, in sentences."""
    warned = []
    if "base" in difficulties:
        graft = difficulties["base"].at(prefix)
        more = graft.loss - difficulties["base"].unharmed_loss
        if graft.agreement >= GRAFT_AGREEMENT or more <= GRAFT_LOSS:
            warned.append(
                f"The public base's layers in place of the sealed ones already get {graft.agreement:.0%} of the tokens "
                f"right and change the loss by {more:+.2f} nats per token, without one query: sealing "
                f"{_blocks(prefix)} protects little of what was added to the base."
            )
    if attack is not None and not attack.stands:
        warned.append(
            f"No prefix tried stands up to the {attack.needed_tokens:,} tokens needed: {_blocks(prefix)} lasts longest"
            f"{_help(attack, prefix, num_layers)}"
        )
    if cost.slowdown_1 > max_slowdown:
        warned.append(
            f"{_blocks(prefix).capitalize()} is predicted to take {cost.slowdown_1:.2f} times as long per step, more "
            f"than the {max_slowdown:g} that is acceptable."
        )
    if tied:
        warned.append("The embedding is tied to the open head, so its matrix is open, whatever is sealed.")
    return warned


def _help(attack: AttackReport, prefix: int, num_layers: int) -> str:
    tried = max(curve.prefix for curve in attack.curves)
    ways = [f"lease fewer tokens (at most {proposal(attack, prefix):,} by this measurement)"]
    if tried < num_layers:
        ways.append(f"try a prefix deeper than {tried}, with a higher --max-slowdown or --candidates")
    ways.append("seal the whole stack on a confidential GPU, or with the masked plan (neither is in this version)")
    return ". What would help: " + "; ".join(ways) + "."


def _price_in_words(bought: Price, budget: int) -> str:
    if bought.tokens is None:
        low = "" if bought.low is None else f" (the careful end of the interval: {bought.low:,})"
        return f"more than the {budget:,} tokens tried{low}"
    if bought.tokens == 0:
        return "no token at all"
    low, high = ("more than was tried" if end is None else f"{end:,}" for end in (bought.low, bought.high))
    return f"{bought.tokens:,} tokens ({low} to {high})"


def _blocks(prefix: int) -> str:
    if prefix == 0:
        return "the embedding alone"
    return f"{prefix} block{'s' if prefix > 1 else ''}"
