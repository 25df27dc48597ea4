"""What a seed decides about the first observations."""

from .data import difference, is_continuous, is_equal
from .report import fault
from .subject import OTHER_SEED, SEED, Subject, said


def check_seeds(subject: Subject, name: str) -> None:
    """Check that the seed decides the first observations, and that a reset without one draws others."""
    arguments: tuple[dict[str, int], ...] = ({"seed": SEED}, {}, {}, {"seed": SEED}, {}, {"seed": OTHER_SEED})
    first, following, third, again, repeated, other = (subject.first_rows(**seed) for seed in arguments)
    for lane in range(subject.env.num_envs):
        for rows, expected, what in (
            (again, first, "two resets with one seed must give the same"),
            (repeated, following, "a reset without a seed must go on with the seeded stream"),
        ):
            found = difference(rows[lane], expected[lane])
            if found:
                raise fault(f"{what}: {found[1]}", step=0, lane=lane, key=found[0])
    subject.varies = any(not is_equal(*pair) for pair in zip(first, other, strict=True))
    if not subject.varies and subject.contract is not None:
        raise fault(f"the seeds {SEED} and {OTHER_SEED} must give different observations", step=0)
    if not subject.varies:
        return subject.findings.cannot(name, "the first observation is the same whatever the seed")
    every = any if is_continuous(subject.player.space) else all
    for rows in (first, third):
        if every(is_equal(*pair) for pair in zip(rows, following, strict=True)):
            raise fault("a reset without a seed must draw another episode, got the same again", step=0)
    if subject.env.num_envs > 1 and all(is_equal(row, rows[0]) for rows in (first, other) for row in rows):
        raise fault("lanes must be seeded differently, but all start alike", step=0)
    return None


def check_seeds_of_lanes(subject: Subject, name: str) -> None:
    """Check that seed s is seed s + i for lane i, and that there may be one for each lane."""
    expected = subject.first_rows(seed=SEED)
    seeds = [SEED + lane for lane in range(subject.env.num_envs)]
    try:
        rows = subject.first_rows(seed=seeds)
    except Exception as error:
        return subject.leave_open(name, f"reset(seed={seeds}) raises {said(error)}")
    for lane, (row, other) in enumerate(zip(rows, expected, strict=True)):
        found = difference(row, other)
        if found:
            what = f"reset(seed={SEED}) must seed lane {lane} with {SEED + lane}: {found[0]}: {found[1]}"
            return subject.leave_open(name, what)
    return None
