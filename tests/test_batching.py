from hypothesis import given
from hypothesis import strategies as st

from inward.batching import pack, within
from inward.types import Group, Job, SamplingSpec


def job(name, tokens, *, samples=False):
    sampling = SamplingSpec(n=2, max_tokens=4) if samples else None
    return Job(str(name), Group((1,) * tokens, sampling=sampling), ("h",))


jobs = st.lists(st.tuples(st.integers(1, 60), st.booleans()), max_size=30).map(
    lambda rows: [job(i, tokens, samples=samples) for i, (tokens, samples) in enumerate(rows)]
)


@given(jobs, st.integers(1, 100))
def test_no_batch_exceeds_its_budget_unless_one_job_does_alone(waiting, budget):
    batch, _ = pack(waiting, budget)
    assert len(batch) == 1 or sum(j.group.tokens for j in batch) <= budget


@given(jobs, st.integers(1, 100))
def test_every_job_is_in_the_batch_or_waits_on_in_order_of_arrival(waiting, budget):
    batch, rest = pack(waiting, budget)
    order = {j.id: i for i, j in enumerate(waiting)}
    for part in (batch, rest):
        assert [order[j.id] for j in part] == sorted(order[j.id] for j in part)
    assert sorted(order[j.id] for j in [*batch, *rest]) == list(range(len(waiting)))


@given(jobs, st.integers(1, 100))
def test_the_oldest_job_always_goes_so_that_nobody_starves(waiting, budget):
    batch, _ = pack(waiting, budget)
    assert batch[:1] == waiting[:1]


@given(jobs, st.integers(1, 100))
def test_a_job_that_samples_goes_alone(waiting, budget):
    batch, _ = pack(waiting, budget)
    assert len(batch) <= 1 or all(j.group.sampling is None for j in batch)


@given(st.lists(st.integers(1, 50), max_size=30), st.integers(1, 100))
def test_batches_hold_everything_in_order_within_the_budget_and_are_as_long_as_it_allows(costs, budget):
    batches = list(within(range(len(costs)), budget, costs.__getitem__))
    assert [i for batch in batches for i in batch] == list(range(len(costs)))
    spent = [sum(costs[i] for i in batch) for batch in batches]
    assert all(len(batch) == 1 or total <= budget for batch, total in zip(batches, spent, strict=True))
    assert all(total + costs[after[0]] > budget for total, after in zip(spent, batches[1:], strict=False))
