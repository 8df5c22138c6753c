"""Tests of the comparison: search for learning rates, jobs, losses, data, tables and the committed results."""

import itertools
import json

import blue_marble
import evidence
import evidence_table
import numpy as np
import pytest
import torch
from scipy import ndimage, stats

ARM_IN_TASK = [(task, arm) for task, arms in evidence.ARMS.items() for arm in arms]
COMPARISON = [
    (task, arm, budget, seed)
    for task, budget, seed in itertools.product(evidence.TASKS, evidence.BUDGETS, evidence.SEEDS)
    for arm in evidence.arms_at(task, budget)
]


def record(arm, seed, iou, task="lakes", **fields):
    return {
        "task": task,
        "arm": arm,
        "seed": seed,
        "budget": 300,
        "rates": [0.01],
        "validation at half": iou,
        "test at half": iou,
        "settings": evidence.SETTINGS,
        **fields,
    }


def complete_comparison(iou):
    """Records of all runs, with the IoU given by the function ``iou(arm, seed)``."""
    return [
        record(arm, seed, iou(arm, seed), task, budget=budget) | {"test at best": iou(arm, seed)}
        for task, arm, budget, seed in COMPARISON
    ]


class TestInterval:
    def test_agrees_with_the_paired_t_test(self):
        """If an end of the interval is subtracted from all differences, the paired t test has p = 0.05."""
        generator = np.random.default_rng(0)
        one, other = generator.normal(70, 3, 6), generator.normal(69, 3, 6)
        interval = evidence_table.Interval.of(one - other)
        low, high = interval.mean - interval.half, interval.mean + interval.half
        for end in (low, high):
            assert stats.ttest_rel(one - end, other).pvalue == pytest.approx(0.05)


class TestTable:
    def test_differences_are_paired_by_seed(self):
        """A difference that is the same on every seed has an interval of 0, even if the IoU depends on the seed."""
        runs = evidence_table.Runs(complete_comparison(lambda arm, seed: 0.1 * seed + 0.02 * (arm == "dice")))
        lines = evidence_table.table(runs, "lakes", "test at half")
        assert lines[0] == ["training", *(f"{steps} steps, 5 seeds" for steps in ("300", "900", "2,700", "8,100"))]
        assert lines[1] == ["cross-entropy", *["20.0"] * 4]
        assert lines[2] == ["Dice", *["22.0 (+2.0 ± 0.0)"] * 3, ""]
        trained = {arm for budget in evidence.BUDGETS for arm in evidence.arms_at("lakes", budget)}
        assert len(lines) == 1 + len(trained)

    def test_a_seed_with_a_missing_run_is_left_out(self):
        records = complete_comparison(lambda arm, seed: 0.5 + 0.1 * seed)
        missing = ("lakes", "hinge", 3, 900)
        records = [r for r in records if (r["task"], r["arm"], r["seed"], r["budget"]) != missing]
        runs = evidence_table.Runs(records)
        assert runs.seeds["lakes", 900] == [0, 1, 2, 4]
        assert runs.seeds["lakes", 300] == runs.seeds["digits", 900] == [0, 1, 2, 3, 4]
        assert runs.iou("lakes", "dice", 900, "test at half") == pytest.approx([50, 60, 70, 90])

    def test_fewer_than_three_seeds_have_no_interval(self):
        records = [r for r in complete_comparison(lambda arm, seed: 0.5 - 0.1 * (arm == "dice")) if r["seed"] < 2]
        lines = evidence_table.table(evidence_table.Runs(records), "lakes", "test at half")
        assert lines[2] == ["Dice", *["40.0 (\N{MINUS SIGN}10.0)"] * 3, ""]

    def test_a_budget_without_a_finished_seed_is_left_out(self):
        records = [r for r in complete_comparison(lambda arm, seed: 0.5) if r["budget"] < 900 or r["arm"] == "ce"]
        runs = evidence_table.Runs(records)
        assert [len(line) for line in evidence_table.table(runs, "digits", "test at half")] == [2] * 10


class TestRates:
    def search(self, best):
        """Run the search on an invented score with its peak at the rate with the index ``best``."""
        tried = {}
        while rates := evidence.next_rates(tried, evidence.FIRST_RATES["one stage"]):
            for rate in rates:
                assert rate not in tried
                tried[rate] = -abs(evidence.RATES.index(rate) - best)
        return tried

    @pytest.mark.parametrize("best", range(len(evidence.RATES)))
    def test_finds_the_peak_and_tries_its_neighbours(self, best):
        tried = self.search(best)
        assert evidence.best_rate(tried) == evidence.RATES[best]
        assert set(evidence.RATES[max(0, best - 1) : best + 2]) <= set(tried)

    def test_averages_over_seeds_and_ignores_rates_with_a_missing_seed(self):
        iou = {0.001: (0.1, 0.8, 0.3), 0.003: (0.5, 0.5, 0.5), 0.01: (0.9, 0.9)}
        search = [
            record("ce", seed, value, rates=[rate])
            for rate, values in iou.items()
            for seed, value in zip(evidence.SEARCH_SEEDS, values)
        ]
        scores = evidence.scores_by_rate(search)["lakes", "ce"]
        assert scores == pytest.approx({0.001: 0.4, 0.003: 0.5})
        assert evidence.best_rate(scores) == 0.003

    def test_nan_is_never_the_best(self):
        search = [
            record("ce", seed, iou, rates=[rate])
            for rate, iou in ((0.01, float("nan")), (0.003, 0.1))
            for seed in evidence.SEARCH_SEEDS
        ]
        assert evidence.best_rate(evidence.scores_by_rate(search)["lakes", "ce"]) == 0.003


@pytest.fixture
def tiny(monkeypatch):
    """Make the runs of the comparison tiny."""
    monkeypatch.setattr(evidence, "SETTINGS", {"size": 48, "scenes": [8, 2, 2], "batch_size": 2})
    monkeypatch.setattr(evidence, "BUDGETS", (4,))
    evidence.task_data.cache_clear()
    yield
    evidence.task_data.cache_clear()


class TestRuns:
    search = [
        record(arm, seed, 0.5, task, rates=[0.01])
        for (task, arm), seed in itertools.product(ARM_IN_TASK, evidence.SEARCH_SEEDS)
    ]

    @pytest.mark.usefixtures("tiny")
    @pytest.mark.parametrize("task", evidence.TASKS)
    def test_every_arm_runs_once(self, task):
        jobs = [j for j in evidence.comparison_jobs([], self.search) if j["task"] == task and j["seed"] == 0]
        done = [run for job in jobs for run in evidence.run_job(job)]
        assert sorted(run["arm"] for run in done) == sorted(evidence.ARMS[task])
        assert all(0 <= value <= 1 for run in done for name, value in run.items() if name.endswith(("half", "best")))
        left = evidence.comparison_jobs(done, self.search)
        assert not [job for job in left if job["task"] == task and job["seed"] == 0]
        assert len(left) == len(evidence.comparison_jobs([], self.search)) - len(jobs)

    @pytest.mark.usefixtures("tiny")
    def test_two_stages_share_the_first(self, monkeypatch):
        trained = []
        original = evidence.train
        monkeypatch.setattr(evidence, "train", lambda *args: trained.append(args[2:5]) or original(*args))
        runs = [(arm, [0.01, 0.001]) for arm in ("ce>ce", "ce>lovasz")]
        evidence.run_job({"task": "lakes", "seed": 0, "budget": 4, "runs": runs})
        assert trained == [("ce", 3, 0.01), ("ce", 1, 0.001), ("lovasz", 1, 0.001)]

    @pytest.mark.usefixtures("tiny")
    def test_runs_are_reproducible(self):
        """A run that is started again after an interruption has the same results."""
        job = {"task": "lakes", "seed": 0, "budget": 4, "runs": [("ce>hinge", [0.01, 0.001])]}
        one, two = (evidence.run_job(job)[0] for _ in range(2))
        assert one["threshold"] == two["threshold"]
        assert one["test at best"] == two["test at best"]

    def test_results_with_other_settings_are_refused(self, tmp_path):
        path = tmp_path / "runs.jsonl"
        path.write_text(json.dumps(record("ce", 0, 0.5, settings={"size": 999})) + "\n")
        with pytest.raises(SystemExit, match="other settings"):
            evidence.read(path)


class TestLosses:
    """For predictions with probabilities of 0 and 1, each loss can be computed by counting pixels."""

    labels = torch.tensor([[[1, 1, 0, 0, 255]], [[0, 0, 0, 1, 255]]])
    predicted = torch.tensor([[[1, 0, 0, 0, 1]], [[1, 1, 0, 1, 0]]])

    @pytest.mark.parametrize(
        ("name", "expected"), [("dice", 1 - 2 * 2 / (3 + 4)), ("jaccard", 1 - 2 / 5), ("lovasz", 1 - 2 / 5)]
    )
    def test_of_the_foreground(self, name, expected):
        value = evidence.make_loss(name)(200.0 * self.predicted[:, None] - 100, self.labels)
        assert value.item() == pytest.approx(expected, abs=1e-5)

    @pytest.mark.parametrize(
        ("name", "expected"),
        [
            ("dice", 1 - (2 * 3 / (5 + 4) + 2 * 2 / (3 + 4)) / 2),
            ("jaccard", 1 - (3 / 6 + 2 / 5) / 2),
            ("lovasz", 1 - (3 / 6 + 2 / 5) / 2),
        ],
    )
    def test_of_the_classes_present(self, name, expected):
        """The third class never occurs and is not counted."""
        logits = 100.0 * torch.nn.functional.one_hot(self.predicted, 3).movedim(-1, 1)
        assert evidence.make_loss(name)(logits, self.labels).item() == pytest.approx(expected, abs=1e-5)

    @pytest.mark.parametrize(
        ("name", "outputs"), [*itertools.product(("ce", "dice", "jaccard", "lovasz"), (1, 3)), ("hinge", 1)]
    )
    def test_only_ignored_pixels_have_no_gradient(self, name, outputs):
        logits = (0.1 * torch.randn(2, outputs, 1, 5, generator=torch.Generator().manual_seed(0))).requires_grad_()
        (gradient,) = torch.autograd.grad(evidence.make_loss(name)(logits, self.labels), logits)
        assert gradient.abs().sum((0, 1, 2))[:4].ne(0).all()
        assert gradient[..., 4].eq(0).all()

    def test_a_mixture_is_the_mean_of_its_losses(self):
        logits = torch.randn(2, 1, 1, 5, generator=torch.Generator().manual_seed(0))
        parts = [evidence.make_loss(name)(logits, self.labels) for name in ("ce", "lovasz")]
        torch.testing.assert_close(evidence.make_loss("ce+lovasz")(logits, self.labels), sum(parts) / 2)


class TestBlueMarble:
    def test_no_test_pixel_is_near_a_training_pixel(self, monkeypatch):
        """Each colour of a test image encodes the position of its pixel, which shows where tiles come from."""
        _, labels = blue_marble.earth()
        place = np.arange(labels.size, dtype=np.int64).reshape(labels.shape)
        code = np.stack([place >> 16, place >> 8 & 255, place & 255], -1).astype(np.uint8)
        monkeypatch.setattr(blue_marble, "earth", lambda: (code, labels))
        seen = {}
        for name, (images, _) in blue_marble.tiles(0, 48).items():
            digits = (255 * images).round().long().movedim(1, -1) @ torch.tensor([65536, 256, 1])
            seen[name] = np.zeros(labels.shape, bool)
            seen[name].ravel()[digits.unique().numpy()] = True
        for one, other in itertools.combinations(seen.values(), 2):
            assert one.any()
            assert ndimage.distance_transform_cdt(~one, "chessboard")[other].min() > 2 * blue_marble.MARGIN

    def test_labels(self):
        """Lake Victoria is lake, the land north-west of it is land, and the Atlantic is ignored."""
        _, labels = blue_marble.earth()
        found = [
            labels[round((90 - lat) * 15), round((180 + lon) * 15)] for lat, lon in ((-1, 33), (1, 31.5), (0, -25))
        ]
        assert found == [1, 0, blue_marble.IGNORE]

    def test_images_and_labels_have_the_same_orientation(self):
        """In all eight orientations, ignored pixels are blue like the sea, and land pixels are not."""
        images, labels = blue_marble.tiles(0, 48)["train"]
        for orientation in range(8):
            part = slice(orientation * len(images) // 8, (orientation + 1) * len(images) // 8)
            red, _, blue = images[part].movedim(1, 0)
            assert (blue - red)[labels[part] == 255].mean() > 0.2
            assert (blue - red)[labels[part] == 0].mean() < 0


class TestSteps:
    def runs(self, mixture):
        """Cross-entropy gains 10 points per budget, and has 5 more on seed 1. The mixture always has the same IoU."""
        places = {budget: place for place, budget in enumerate(sorted(evidence.BUDGETS))}
        records = complete_comparison(lambda arm, seed: 0.05 * (seed == 1) if arm == "ce" else mixture)
        for record in records:
            if record["arm"] == "ce":
                for name in [name for name in record if name.startswith("test at")]:
                    record[name] += 0.1 * places[record["budget"]]
        return evidence_table.Runs(records)

    def test_steps_of_cross_entropy(self):
        found = evidence_table.steps_of_reference(self.runs(0.15), "lakes", "ce+lovasz", 900, "test at half")
        halfway = (900 * 2700) ** 0.5
        assert found == pytest.approx([halfway, 900.0, *[halfway] * 3])
        found = evidence_table.steps_of_reference(self.runs(0.32), "lakes", "ce+lovasz", 900, "test at half")
        assert np.isinf(found).tolist() == [True, False, True, True, True]

    def test_ratio(self):
        assert evidence_table.ratio_of_steps(self.runs(0.2), "lakes", "ce+lovasz", 900, "test at half").startswith(
            "2.7 ("
        )
        said = evidence_table.ratio_of_steps(self.runs(0.32), "lakes", "ce+lovasz", 900, "test at half")
        assert said == "not reached on 4 of 5 seeds"


class TestCommitted:
    """The committed results are complete, and the committed texts agree with them."""

    def test_every_run_of_the_comparison_is_there_once(self):
        found = [(run["task"], run["arm"], run["budget"], run["seed"]) for run in evidence.read(evidence_table.RUNS)]
        assert len(found) == len(set(found))
        assert set(found) <= set(COMPARISON)
        runs = evidence_table.read()
        for task in evidence.TASKS:
            for budget in evidence.BUDGETS:
                assert len(runs.seeds[task, budget]) == len(evidence.SEEDS) >= 5

    def test_every_run_has_the_best_learning_rate(self):
        search = evidence.read(evidence_table.SEARCH)
        assert evidence.search_jobs(search) == []
        scores = evidence.scores_by_rate(search)
        for run in evidence.read(evidence_table.RUNS):
            arm = evidence.SHARED_RATES.get(run["arm"], run["arm"])
            assert run["rates"][-1] == evidence.best_rate(scores[run["task"], arm])

    def test_best_weights_come_from_the_same_trainings(self):
        """With the last weights, the IoU is about that of the comparison. Training repeats only approximately."""
        kept = evidence.read(evidence_table.KEPT)
        assert evidence.best_weights_jobs(kept, evidence.read(evidence_table.SEARCH)) == []
        runs = evidence_table.read()
        for record in kept:
            other = runs.found[record["task"], record["arm"], record["budget"], record["seed"]]
            assert record["rates"] == other["rates"]
            assert record["kept after"] <= record["budget"]
            assert record["last"]["test at half"] == pytest.approx(other["test at half"], abs=0.08)

    def test_readme_is_up_to_date(self):
        readme = (evidence_table.ROOT / "README.md").read_text(encoding="utf-8")
        assert evidence_table.readme_block(evidence_table.read()) in readme

    @pytest.mark.parametrize("page", ["README.md", "docs/source/verdict.rst"])
    def test_front_pages_agree_with_the_results(self, page):
        text = " ".join((evidence_table.ROOT.parent / page).read_text(encoding="utf-8").split())
        runs = evidence_table.read()
        if page == "README.md":
            for task, measure in (("lakes", "test at best"), ("digits", "test at half")):
                mean, _, interval = evidence_table.ratio_of_steps(runs, task, "ce+lovasz", 900, measure).partition(" ")
                assert mean in text
                assert interval.strip("()") in text
            *_, (arm, _, best_weights, _) = evidence_table.kept_table(evidence.read(evidence_table.KEPT))
            assert arm == "cross-entropy + Lovász-Softmax, lakes, at the best threshold, 2,700 steps"
            assert best_weights.partition("(+")[2].strip(")") in text
        measures = (("lakes", "test at best"), ("digits", "test at half"))
        for (task, measure), budget in itertools.product(measures, evidence.BUDGETS):
            assert str(runs.difference(task, "ce+lovasz", budget, measure)).removeprefix("+") in text
            best = max(evidence.arms_at(task, budget), key=lambda arm: runs.iou(task, arm, budget, measure).mean())
            ahead = runs.iou(task, best, budget, measure) - runs.iou(task, "ce+lovasz", budget, measure)
            assert (
                best == "ce+lovasz" or evidence_table.Interval.of(ahead).mean < evidence_table.Interval.of(ahead).half
            )
