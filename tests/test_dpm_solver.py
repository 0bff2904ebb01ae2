"""The solver's tables against an exact solution: order of convergence, end points, bad arguments."""

import numpy as np
import pytest

from mindsigma import MindSigmaError
from mindsigma.sampling.dpm_solver import DPMSolver
from mindsigma.sampling.schedule import alphas_cumprod, log_alpha

DATA_STD = 0.6


class Named:
    """A Row of the table with names for its numbers; weights up to the last that is not 0."""

    def __init__(self, row):
        self.timestep = row.timestep
        self.alpha, self.sigma, self.keep, *weights = row.numbers
        assert len(weights) == DPMSolver.kept + 1  # whatever the order, as one graph serves all
        self.weights = tuple(np.trim_zeros(weights, "b"))


def solver_table(num_steps, order=2, convention="diffusers"):
    """List of Named."""
    return [Named(row) for row in DPMSolver(order, convention).table(num_steps)]


def run(table, start, bend=0.0):
    """Latents before each step and at the end, with the perfect model of data N(0, DATA_STD²) plus bend * sin(3x)."""
    x, history, trajectory = start, [], [start]
    for step in table:
        variance = step.alpha**2 * DATA_STD**2 + step.sigma**2
        noise = step.sigma * x / variance + bend * np.sin(3 * x)
        history.insert(0, (x - step.sigma * noise) / step.alpha)
        x = step.keep * x + sum(weight * x0 for weight, x0 in zip(step.weights, history))
        trajectory.append(x)
    return trajectory


def exact(start, alpha_0, sigma_0, alpha_1, sigma_1):
    """The probability flow keeps x / std(x): closed form."""
    return start * np.sqrt((alpha_1**2 * DATA_STD**2 + sigma_1**2) / (alpha_0**2 * DATA_STD**2 + sigma_0**2))


def error_at(num_steps, order, fraction):
    """Relative error of the official convention's latents after this fraction of the steps."""
    table = solver_table(num_steps, order, "official")
    i = int(num_steps * fraction)
    first, here = table[0], table[i]
    expected = exact(1.0, first.alpha, first.sigma, here.alpha, here.sigma)
    return abs(run(table, 1.0)[i] / expected - 1)


# What diffusers 0.42.1 computes in float64 with `run`'s bent model: middle, last but one and last latents.
DIFFUSERS = {
    (1, 6): (0.593877, 0.367116, 0.166358),
    (1, 20): (0.816967, 0.377099, 0.336629),
    (2, 6): (0.742427, 0.538342, 0.261969),
    (2, 20): (0.846588, 0.454065, 0.407294),
    (3, 6): (0.709335, 0.507836, 0.243828),
    (3, 20): (0.843600, 0.447118, 0.400879),
}


@pytest.mark.parametrize(("order", "num_steps"), DIFFUSERS)
def test_trajectory_is_diffusers(order, num_steps):
    trajectory = run(solver_table(num_steps, order), 1.0, bend=0.1)[1:]
    values = [trajectory[num_steps // 2], trajectory[-2], trajectory[-1]]
    assert np.allclose(values, DIFFUSERS[order, num_steps], atol=1.5e-6)


@pytest.mark.parametrize(("order", "rate"), [(1, 1.9), (2, 3.7), (3, 3.7)])
def test_order_of_convergence(order, rate):
    """Twice the steps divide the error by 2 or 4, while the log-SNR is smooth in time.

    Order 3 starts with a step of first order, which leaves it at the rate of 2.
    """
    errors = [error_at(n, order, 0.75) for n in (100, 200, 400)]
    assert errors[0] / errors[1] > rate and errors[1] / errors[2] > rate


def test_higher_orders_are_better():
    errors = [error_at(100, order, 0.75) for order in (1, 2, 3)]
    assert errors[0] > 20 * errors[1] > 80 * errors[2]


def test_diffusers_grid():
    """20 and 14 steps as diffusers lists them; the end is a clean image, reached at first order."""
    table = solver_table(20)
    assert [step.timestep for step in table][:3] == [999, 949, 899] and table[-1].timestep == 50
    assert [step.timestep for step in solver_table(14)][-1] == 71
    assert table[-1].keep == 0.0 and table[-1].weights == (1.0,)
    assert [len(step.weights) for step in table] == [1] + [2] * 18 + [1]
    assert [len(step.weights) for step in solver_table(20, 3)] == [1, 2] + [3] * 17 + [1]
    assert [len(step.weights) for step in solver_table(8, 3)] == [1, 2, 3, 3, 3, 3, 2, 1]


def test_official_grid():
    times = [step.timestep for step in solver_table(20, 2, "official")]
    assert np.allclose(times[:3], [999, 949.05, 899.1]) and np.isclose(times[-1], 49.95)
    assert solver_table(20, 2, "official")[-1].keep > 0


def test_weights_keep_a_constant_prediction():
    """If every prediction is the same x0, alpha and sigma mix it with the noise exactly."""
    for convention in ("diffusers", "official"):
        for order in (1, 2, 3):
            table = solver_table(30, order, convention)
            for step, following in zip(table, table[1:]):
                assert np.isclose(sum(step.weights), following.alpha - step.keep * step.alpha, atol=1e-12)
                assert np.isclose(step.keep * step.sigma, following.sigma, atol=1e-12)


def test_schedule():
    products = alphas_cumprod()
    assert (
        products.dtype == np.float64
        and np.isclose(products[0], 0.9999)
        and np.isclose(products[999], 4.036e-5, rtol=1e-3)
    )
    assert np.isclose(np.exp(2 * log_alpha(0.5)), products[499])


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ((0,), "num_inference_steps"),
        ((-5,), "num_inference_steps"),
        ((2.5,), "num_inference_steps"),
        ((2000,), "num_inference_steps"),
        ((20, 4), "solver_order"),
        ((20, 2, "ddim"), "convention"),
    ],
)
def test_bad_arguments(arguments, word):
    with pytest.raises(MindSigmaError, match=word):
        solver_table(*arguments)


@pytest.mark.parametrize("convention", ["diffusers", "official"])
def test_most_steps(convention):
    assert all(np.isfinite(step.weights).all() for step in solver_table(999, 3, convention))
