"""Pictures of two digits from scikit-learn: which digits, and how far apart. No file is needed."""

from functools import partial

from gradbal.lab.models.two_digits import HEADS, STAGES
from gradbal.lab.problems import files
from gradbal.lab.problems.losses import cross_entropy, squared_error
from gradbal.lab.problems.metrics import Accuracy, Errors
from gradbal.lab.problems.pictures import COPIES
from gradbal.lab.problems.pictures import two_digits as pictures
from gradbal.lab.problems.problem import Examples, Problem, Task


def load(*, seed: int = 0, copies: tuple[int, int, int] = COPIES) -> Problem:
    """Make the pictures of the demo, with distances in units of their deviation.

    Args:
        seed: Of the split of the digits and of the pictures.
        copies: Pictures of each pair of digits for training, validation and test.

    Raises:
        ValueError: If scikit-learn is not installed.
    """
    files.package("two_digits", "sklearn", "scikit-learn")
    made = pictures(seed, copies)
    distances = made[0].y["distance"]
    mean, spread = distances.mean(), distances.std()
    train, validation, test = (
        Examples(part.x, {**part.y, "distance": (part.y["distance"] - mean) / spread})
        for part in made
    )
    digit = Task(cross_entropy, Accuracy, "accuracy")
    distance = Task(squared_error, partial(Errors, spread.item()), "mae")
    return Problem(
        name="two_digits",
        tasks={"left": digit, "right": digit, "distance": distance},
        train=train,
        validation=validation,
        test=test,
        stages=STAGES,
        heads=HEADS,
        batch=64,
    )
