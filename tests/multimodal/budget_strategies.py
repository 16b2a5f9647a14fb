"""Hypothesis strategies for token budgets, for every test that checks a law of the budget interface."""

from hypothesis import strategies as st

from tokenthrift.budget import TokenBudget

# Two decimals, as people write shares; floats of 17 digits would only test Fraction.
SHARES = st.integers(1, 100).map(lambda percent: percent / 100)
RATES = st.integers(1, 500).map(lambda tenths: tenths / 10)


def budgets(*, seconds: bool = True, floor: int = 0) -> st.SearchStrategy[TokenBudget]:
    """Budgets whose floor no ceiling can fall below.

    Args:
        seconds: Whether `tokens_per_second` may be set.
        floor: `min_tokens`; 0 lets any ceiling pass.
    """
    return st.builds(
        TokenBudget,
        max_tokens=st.none() | st.integers(max(floor, 1), 40),
        retention=st.none() | SHARES,
        tokens_per_second=st.none() | RATES if seconds else st.none(),
        min_tokens=st.just(floor),
    )
