"""The samplers' tables: exact solutions of a Gaussian problem, the peers' grids, what is refused.

For data N(0, DATA_STD²) the perfect prediction of the noise is known. Latents are followed as vectors: how much of the
start noise and of every fresh draw is in them, so that the variance that a stochastic sampler ends with is exact.
"""

import json

import numpy as np
import pytest
from conftest import GOLDEN
from mindspore import Tensor

from mindsigma import MindSigmaError
from mindsigma.sampling import SAMPLERS
from mindsigma.sampling.ddim import DDIM
from mindsigma.sampling.dpm_solver import DPMSolver
from mindsigma.sampling.euler import Euler
from mindsigma.sampling.euler_ancestral import EulerAncestral
from mindsigma.sampling.grids import at_timesteps, spaced, spaced_officially
from mindsigma.sampling.iddpm import IDDPM
from mindsigma.sampling.inpainting import Inpainting
from mindsigma.sampling.lcm import LCM
from mindsigma.sampling.one_step import OneStep
from mindsigma.sampling.options import SamplingOptions
from mindsigma.sampling.sa_solver import SASolver
from mindsigma.sampling.unipc import UniPC

DATA_STD = 0.6


def std_at(row):
    """Exact standard deviation of the latents at a row."""
    return np.sqrt((row.alpha * DATA_STD) ** 2 + row.sigma**2)


def prediction(latents, row):
    """The noise that a perfect network predicts."""
    return latents * row.sigma / std_at(row) ** 2


def jump(latents, row):
    """The noise of which follow the clean latents where the probability flow ends: a perfect consistency model."""
    return (latents - row.alpha * latents * DATA_STD / std_at(row)) / row.sigma


def spread(sampler, rows, network=prediction, kind=np.asarray):
    """Standard deviation of the latents before each row and after the last, from the exact one at the first row."""
    latents = np.zeros(1 + len(rows))
    latents[0] = std_at(rows[0])
    latents, history, variance = kind(latents), tuple(kind(0 * latents) for _ in range(sampler.kept)), None
    stds = [std_at(rows[0])]
    for i, row in enumerate(rows):
        fresh = kind(np.eye(len(rows) + 1)[i + 1])
        if sampler.learned_variance:
            variance = 0 * latents + 1  # the upper bound of the variance
        latents, history = sampler.construct(latents, history, row.numbers, network(latents, row), variance, fresh)
        stds.append(np.linalg.norm(latents.asnumpy() if isinstance(latents, Tensor) else latents))
    return stds


def tensor(array):
    return Tensor(np.asarray(array, np.float32))


WHOLE, FRACTIONS = (100, 200), (100, 200, 400)  # steps whose timesteps are even: whole ones only if they divide 1000

ORDERS = [
    (lambda: DDIM(), 1.9, WHOLE),
    (lambda: DDIM(eta=0.5), 1.9, WHOLE),
    (lambda: DDIM(eta=1.0), 1.9, WHOLE),
    (lambda: Euler(spacing="trailing"), 1.9, WHOLE),
    (lambda: EulerAncestral(spacing="trailing"), 1.9, WHOLE),
    (lambda: DPMSolver(2, "official"), 3.7, FRACTIONS),
    (lambda: SASolver(eta=0, convention="official"), 3.7, FRACTIONS),
    (lambda: SASolver(eta=1, convention="official"), 3.7, FRACTIONS),
    (lambda: SASolver(eta=0.5), 3.4, WHOLE),
    (lambda: IDDPM(), 1.9, WHOLE),
    (lambda: UniPC(), 6.0, WHOLE),  # the corrector adds an order
]


@pytest.mark.parametrize(("make", "rate", "numbers"), ORDERS)
def test_order_of_convergence(make, rate, numbers):
    """Twice the steps divide the error of the standard deviation, three quarters on the way, by 2 or by 4."""
    errors = []
    for steps in numbers:
        sampler = make()
        rows, at = sampler.table(steps), 3 * steps // 4
        kind = tensor if sampler.learned_variance else np.asarray  # it computes by MindSpore's operators
        errors.append(abs(spread(sampler, rows[:at], kind=kind)[-1] / std_at(rows[at]) - 1))
    assert all(before / after > rate for before, after in zip(errors, errors[1:])), errors


# What diffusers 0.42.1 computes in float64, its tables in fp32, for data bent by a sine: latents in the middle, after
# the last but one and after the last step, from unit noise of 1 and with the draws of `test_trajectory_is_diffusers`.
PEERS = [
    (EulerAncestral(), 4, (-0.013161, -0.013161, -0.013118)),
    (EulerAncestral(), 20, (0.328338, 0.271195, 0.270407)),
    (Euler(), 12, (0.711063, 0.278521, 0.277715)),
    (Euler(spacing="trailing"), 12, (0.766062, 0.365945, 0.286623)),
    (Euler(spacing="leading"), 12, (0.742791, 0.323121, 0.322222)),
    (Euler(sigmas=(100, 20, 5, 1, 0.3, 0)), 5, (0.470908, 0.243346, 0.183242)),
    (Euler(timesteps=(900, 500, 100, 20)), 4, (0.060660, 0.060660, 0.058367)),
    (SASolver(), 4, (0.570563, 0.570563, 0.111119)),  # with noise in the last interval
    (SASolver(), 12, (1.384151, 0.377908, 0.298157)),
    (DPMSolver(karras=True), 16, (0.839989, 0.470929, 0.469834)),
    (DPMSolver(timesteps=(999, 600, 300, 5, 0)), 5, (0.656867, 0.716927, 0.715927)),
    (UniPC(), 6, (0.744158, 0.533235, 0.258897)),
    (UniPC(), 20, (0.846602, 0.453678, 0.406937)),
]


@pytest.mark.parametrize(("sampler", "steps", "expected"), PEERS)
def test_trajectory_is_diffusers(sampler, steps, expected):
    rows, trajectory = sampler.table(steps), []
    latents, history = sampler.start_scale(rows), (0.0,) * sampler.kept
    for i, row in enumerate(rows):
        noise, fresh = prediction(latents, row) + 0.1 * np.sin(3 * latents), np.random.default_rng([7, i])
        latents, history = sampler.construct(latents, history, row.numbers, noise, None, fresh.standard_normal(3)[0])
        trajectory.append(latents)
    assert np.allclose([trajectory[steps // 2], *trajectory[-2:]], expected, atol=2e-5)


@pytest.mark.parametrize("steps", [1, 2, 3, 7])
@pytest.mark.parametrize("convention", ["diffusers", "official"])
def test_a_perfect_consistency_model_is_sampled_exactly(steps, convention):
    sampler = LCM(convention=convention)
    assert np.isclose(spread(sampler, sampler.table(steps), jump)[-1], DATA_STD, rtol=1e-5)


def test_one_step_is_the_clean_latents_of_its_timestep():
    (row,) = OneStep(timesteps=(599,)).table(1)
    assert np.isclose(spread(OneStep(), [row], jump)[-1], DATA_STD, rtol=1e-12) and row.timestep == 599


ALL = [
    DPMSolver(), DPMSolver(3, "official"), DPMSolver(karras=True), DDIM(), DDIM(spacing="leading", eta=1.0),
    DDIM(convention="official"), IDDPM(), SASolver(), SASolver(convention="official"), Euler(), Euler(karras=True),
    Euler(spacing="leading"), EulerAncestral(), LCM(), LCM(convention="official"), UniPC(),
]  # fmt: skip


@pytest.mark.parametrize("sampler", ALL, ids=lambda one: type(one).__name__)
def test_rows_of_every_sampler(sampler):
    """Levels fall, signal and noise add up, and the rest of a table is a table for its own begin."""
    rows, rest = sampler.table(12), sampler.table(12, begin=5)
    assert [row.timestep for row in rest] == [row.timestep for row in rows[5:]]
    for row, other in zip(rows[5:], rest):
        assert (row.alpha, row.sigma) == (other.alpha, other.sigma)
    assert rest[0].numbers[:2] == (rest[0].alpha, rest[0].sigma) and rest[-1].numbers == rows[-1].numbers
    levels = [row.sigma / row.alpha for row in rows]
    assert levels == sorted(levels, reverse=True) and len({row.timestep for row in rows}) == 12
    assert np.allclose([row.alpha**2 + row.sigma**2 for row in rows], 1)
    # Whatever was kept before is not looked at where a table begins.
    noise, fresh = np.array([0.3, -1.0]), np.array([0.5, 0.2])
    starts = [tuple(np.full(2, value) for _ in range(sampler.kept)) for value in (0.0, 7.0)]
    if not sampler.learned_variance:
        one, two = (
            sampler.construct(np.array([1.0, 2.0]), history, rest[0].numbers, noise, None, fresh)[0]
            for history in starts
        )
        assert (one == two).all()


def test_a_constant_prediction_is_kept():
    """If every prediction is the same clean latents, they end there but for the noise that a sampler leaves."""
    for sampler in ALL:
        if sampler.learned_variance:
            continue
        rows = sampler.table(12)
        latents, history = np.array([rows[0].alpha]), tuple(np.zeros(1) for _ in range(sampler.kept))
        for row in rows:  # no noise: what is predicted is what lies beside the clean latents of 1
            noise = (latents - row.alpha) / row.sigma
            latents, history = sampler.construct(latents, history, row.numbers, noise, None, np.zeros(1))
        assert np.isclose(latents[0], 1.0, atol=1e-4), type(sampler)


def followed(sampler, steps, rng, history, kind):
    """(clean, found) of every step: the clean latents that a network predicts there, drawn, and what `clean` says."""
    latents = rng.standard_normal(4)
    for row in sampler.table(steps):
        before, (clean, fresh) = latents, rng.standard_normal((2, 4))
        given = kind(before), history, row.numbers, kind((before - row.alpha * clean) / row.sigma), kind(fresh)
        made, history = sampler.construct(*given, kind(fresh))
        latents, kept = (made, history) if kind is np.asarray else (made.asnumpy(), [x.asnumpy() for x in history])
        yield clean, sampler.clean(row, before, latents, kept, fresh)


@pytest.mark.parametrize("sampler", [*ALL, OneStep()], ids=lambda one: type(one).__name__)
def test_clean_latents_of_every_step(sampler):
    """`clean` gives back what the network predicted, from what the sampler made of it; under a mask it is the image."""
    rng, steps = np.random.default_rng(0), 1 if isinstance(sampler, OneStep) else 12
    kind = tensor if sampler.learned_variance else np.asarray
    history = tuple(kind(np.zeros(4)) for _ in range(sampler.kept))
    for clean, found in followed(sampler, steps, rng, history, kind):
        assert np.allclose(found, clean, rtol=0, atol=1e-3 if kind is tensor else 1e-10)
    image, mask = rng.standard_normal(4), np.array([0.0, 1.0, 0.0, 1.0])
    masked = Inpainting(sampler, image, rng.standard_normal(4), mask)
    for clean, found in followed(masked, steps, rng, masked.start_history((4,)), tensor):
        assert np.allclose(found, np.where(mask, clean, image), rtol=0, atol=1e-3)


def test_euler_is_ddim_of_its_levels():
    """On whole timesteps both are one method; a draw in full is the ancestral one."""
    for eta, euler in ((0.0, Euler(spacing="trailing")), (1.0, EulerAncestral(spacing="trailing"))):
        rows = DDIM(eta=eta).table(20)
        assert all(np.allclose(a.numbers, b.numbers) for a, b in zip(rows, euler.table(20)))
    rows = EulerAncestral().table(10)
    for row, after in zip(rows, rows[1:]):  # as diffusers writes it, in levels
        level, low = row.sigma / row.alpha, after.sigma / after.alpha
        up = np.sqrt(low**2 * (level**2 - low**2) / level**2)
        down = np.sqrt(low**2 - up**2)
        keep, weight, std = row.numbers[2:]
        assert np.isclose(std, after.alpha * up) and np.isclose(keep * row.sigma, after.alpha * down)
        assert np.isclose(weight + keep * row.alpha, after.alpha)


def test_where_diffusers_starts_euler():
    """From unit noise times the first level; with spacing leading times sqrt(level² + 1), which is 1 here."""
    for sampler in (Euler(), Euler(karras=True), EulerAncestral(), Euler(timesteps=(900, 400))):
        row = sampler.table(sampler.steps)[0]
        assert np.isclose(sampler.start_scale([row]), row.sigma)
    assert Euler(spacing="leading").start_scale(Euler(spacing="leading").table(5)) == 1
    assert DDIM().start_scale(DDIM().table(5)) == 1


def test_grids_of_the_peers():
    def times(sampler, steps):
        return [row.timestep for row in sampler.table(steps)]

    assert times(DDIM(spacing="trailing"), 14) == [
        999, 928, 856, 785, 713, 642, 570, 499, 428, 356, 285, 213, 142, 70
    ]  # fmt: skip
    assert times(DDIM(spacing="leading"), 14)[:3] == [923, 852, 781]
    assert times(DDIM(spacing="leading", convention="official"), 14)[:2] == [936, 864]
    assert times(DDIM(spacing="linspace"), 20)[-3:] == [105, 53, 0]
    assert times(IDDPM(), 100)[:8] == [999, 989, 979, 969, 959, 949, 938, 928]
    assert times(SASolver(), 25) == [*range(999, 518, -40), *range(480, 39, -40)]
    assert times(SASolver(), 25) == times(DPMSolver(), 25)
    assert times(DPMSolver(karras=True), 20) == [
        999, 971, 940, 908, 872, 833, 790, 743, 689, 627, 556, 472, 373, 265, 164, 88, 41, 16, 4, 0
    ]  # fmt: skip
    assert times(DPMSolver(karras=True), 100).count(1) == 2  # told apart by their levels
    assert times(LCM(), 14) == [999, 939, 859, 799, 719, 659, 579, 499, 439, 359, 299, 219, 159, 79]
    assert times(LCM(convention="official"), 14)[-1] == 219 and times(LCM(), 50)[-1] == 19
    assert spaced(1, "linspace")[0] == spaced_officially(1, "linspace")[0] == spaced(1, "trailing")[0] == 999
    for file, array, sampler in (
        ("euler", "euler", Euler()),
        ("euler", "euler_karras", Euler(karras=True)),
        ("dpm_grids", "dpm_karras", DPMSolver(karras=True)),
    ):
        stored = json.loads(str(np.load(GOLDEN / f"sampler_{file}.npz")["config"]))["grids"][array]
        rows = sampler.table(len(stored["timesteps"]))
        assert np.allclose([row.timestep for row in rows], stored["timesteps"], atol=0.02)
        assert np.allclose([row.sigma / row.alpha for row in rows], stored["sigmas"][:-1], rtol=1e-4)


def test_given_grids():
    sigmas = [100.0, 10.0, 1.0, 0.1]
    rows = Euler(sigmas=[*sigmas, 0.0]).table(4)
    assert np.allclose([row.sigma / row.alpha for row in rows], sigmas) and rows[0].timestep % 1 > 0
    assert all(row.timestep % 1 == 0 for row in DPMSolver(sigmas=[*sigmas, 0.0]).table(4))
    noisy = Euler(sigmas=sigmas)  # the last is where it ends
    assert noisy.steps == 3 and noisy.table(3)[-1].numbers[3] < 1
    assert [row.timestep for row in DDIM(timesteps=[900, 500, 3]).table(3)] == [900, 500, 3]
    halves = Euler(timesteps=[900.5, 20.25]).table(2)
    assert halves[1].timestep == 20.25
    levels = [row.sigma / row.alpha for row in Euler(timesteps=[20, 21][::-1]).table(2)]
    assert np.isclose(Euler(timesteps=[20.25]).table(1)[0].sigma / Euler(timesteps=[20.25]).table(1)[0].alpha,
                      levels[1] + 0.25 * (levels[0] - levels[1]))  # fmt: skip
    sections = IDDPM(timesteps=[999, 700, 400, 100]).table(4)
    assert sections[-1].numbers[2:4] == (0.0, 1.0) and not sections[-1].draws
    options = SamplingOptions(timesteps=np.array([999, 500]))
    assert options.num_inference_steps == 2 and options.timesteps == (999.0, 500.0)
    assert SamplingOptions(sampler="euler", sigmas=[10, 1, 0]).num_inference_steps == 2


def test_levels_of_whole_timesteps_are_those_of_training():
    grid = at_timesteps([999, 0])
    assert np.allclose(grid.alphas**2, [4.03583e-5, 0.9999, 1.0], rtol=1e-5)


REFUSED = [
    ({"sampler": "lcm", "eta": 1.0}, "eta is for sampler ddim, sa, not for lcm: it takes timesteps"),
    ({"eta": 0.5}, "eta is for sampler ddim, sa, not for dpm"),
    ({"sampler": "sa", "karras": True}, "karras is for sampler dpm, euler, euler-ancestral.*, not for sa"),
    ({"sampler": "euler", "solver_order": 2}, "solver_order is for sampler dpm, not for euler"),
    ({"sampler": "ddim", "sigmas": [2, 1]}, "sigmas is for sampler dpm, euler, euler-ancestral.*, not for ddim"),
    ({"guided_channels": 3}, "guided_channels is for sampler ddim, iddpm"),
    ({"sampler": "ddim", "eta": 1.5}, "eta must be a number of 0 ... 1"),
    ({"sampler": "sa", "eta": -1}, "eta of sampler sa must be"),
    ({"sampler": "ddim", "eta": float("nan")}, "eta must be"),
    ({"sampler": "ddim", "spacing": "even"}, "spacing .* must be one of leading, trailing, linspace"),
    ({"sampler": "ddim", "spacing": "leading", "timesteps": [9, 5]}, "spacing and timesteps exclude each other"),
    ({"karras": True, "sigmas": [9, 5]}, "karras and sigmas exclude each other"),
    ({"timesteps": [5, 9]}, "timesteps must fall .* 9 follows 5"),
    ({"timesteps": [1000, 9]}, "timesteps must lie within 0 ... 999"),
    ({"timesteps": [9.5, 1]}, "timesteps must be whole numbers"),
    ({"timesteps": []}, "timesteps must be a list"),
    ({"timesteps": "999"}, "timesteps must be a list"),
    ({"timesteps": [9, None]}, "timesteps must be a list"),
    ({"timesteps": [900, 100], "num_inference_steps": 3}, "num_inference_steps 3: the timesteps make 2 steps"),
    ({"sampler": "euler", "sigmas": [1, 2]}, "sigmas must fall"),
    ({"sampler": "euler", "sigmas": [500, 2]}, "sigmas must be .* within 0 ... 157.41"),
    ({"sampler": "euler", "sigmas": [5]}, "sigmas must be at least two"),
    ({"sampler": "sa", "timesteps": [500, 0]}, "timesteps of sampler sa must end above 0"),
    ({"sampler": "one-step", "timesteps": [500, 1]}, "one-step takes one of timesteps, not 2"),
    ({"sampler": "one-step", "num_inference_steps": 2}, "num_inference_steps of sampler one-step"),
    ({"sampler": "lcm", "num_inference_steps": 51}, "num_inference_steps of sampler lcm must be .* 1 ... 50"),
    ({"sampler": "iddpm", "num_inference_steps": 1}, "num_inference_steps of sampler iddpm must be .* 2 ... 1000"),
    ({"sampler": "iddpm", "guided_channels": 0}, "guided_channels must be"),
    ({"guidance_rescale": 1.5}, "guidance_rescale must be a number of 0 ... 1"),
    ({"guidance_rescale": 0.5, "guidance_scale": 1.0}, "guidance_rescale needs guidance"),
    ({"sampler": "lcm", "guidance_rescale": 0.5}, "guidance_rescale needs guidance"),
    ({"karras": "yes"}, "karras must be True or False"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED, ids=lambda value: str(value)[:40])
def test_what_does_not_fit_is_refused(options, message):
    with pytest.raises(MindSigmaError, match=message) as caught:
        SamplingOptions(**options)
    assert "\n" not in str(caught.value)


OFFICIALLY_REFUSED = [
    ({"karras": True}, "karras is for convention diffusers"),
    ({"timesteps": [900, 100]}, "timesteps is for convention diffusers"),
    ({"sampler": "sa", "timesteps": [900, 100]}, "timesteps is for convention diffusers"),
    (
        {"sampler": "ddim", "spacing": "trailing"},
        "spacing of sampler ddim in convention official must be",
    ),
]


@pytest.mark.parametrize(("options", "message"), OFFICIALLY_REFUSED, ids=lambda value: str(value)[:40])
def test_what_the_official_convention_does_not_take(options, message):
    with pytest.raises(MindSigmaError, match=message):
        SamplingOptions(**options).solver("official")
    with pytest.raises(MindSigmaError, match="no whole stride makes so many steps.*take 59"):
        DDIM(spacing="leading", convention="official").table(60)


def test_defaults_are_the_samplers_own():
    steps = {
        "dpm": 20, "ddim": 20, "iddpm": 100, "sa": 25, "euler": 20, "euler-ancestral": 20, "lcm": 4, "one-step": 1
    }  # fmt: skip
    assert {name: SamplingOptions(sampler=name).num_inference_steps for name in steps} == steps
    assert [name for name in SAMPLERS if not SamplingOptions(sampler=name).guided] == ["lcm", "one-step"]
    told = SamplingOptions(sampler="ddim", eta=0.5, guidance_rescale=0.7).metadata()
    assert (told["eta"], told["guidance_rescale"], told["steps"]) == (0.5, 0.7, 20)
    assert not {"karras", "timesteps", "solver_order", "spacing"} & told.keys()
    assert SamplingOptions(timesteps=[999, 9]).metadata()["timesteps"] == "999.0 9.0"
    given = {field: getattr(SamplingOptions(sampler="lcm"), field) for field in ("guided", "sampler")}
    assert SamplingOptions(**SamplingOptions(sampler="lcm").as_arguments()) == SamplingOptions(sampler="lcm"), given
