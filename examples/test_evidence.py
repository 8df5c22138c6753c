import json

import evidence
import evidence_table
import numpy as np
import pytest
import torch
from scipy import stats


def record(arm, seed, iou, task="looped digits", **more):
    return {
        "task": task,
        "arm": arm,
        "seed": seed,
        "rates": [0.01],
        "validation at half": iou,
        "test at half": iou,
        "settings": evidence.SETTINGS,
        **more,
    }


class TestInterval:
    def test_agrees_with_the_paired_t_test(self):
        """The interval touches 0 exactly where the two-sided paired test has p = 0.05."""
        generator = np.random.default_rng(0)
        one, other = generator.normal(70, 3, 6), generator.normal(69, 3, 6)
        interval = evidence_table.Interval.of(one - other)
        low, high = interval.mean - interval.half, interval.mean + interval.half
        for end in (low, high):
            assert stats.ttest_rel(one - end, other).pvalue == pytest.approx(0.05)

    def test_is_paired(self):
        """A difference that is the same in every seed has no spread, however much the seeds differ."""
        runs = [record("ce", seed, 0.1 * seed) for seed in range(3)]
        runs += [record("dice", seed, 0.1 * seed + 0.02) for seed in range(3)]
        lines = evidence_table.table(runs, "looped digits")
        assert lines[1:] == [["cross-entropy", "3", "10.0", ""], ["Dice", "3", "12.0", "+2.0 ± 0.0"]]

    def test_compares_the_seeds_that_both_have(self):
        runs = [record("ce", seed, 0.5 + seed) for seed in range(3)] + [
            record("dice", seed, 0.6 + seed) for seed in (2, 0)
        ]
        values = evidence_table.by_seed(runs, "looped digits", "test at half")
        assert evidence_table.paired(values, "dice", "ce").tolist() == pytest.approx([10, 10])

    def test_fewer_than_three_seeds_have_no_interval(self):
        lines = evidence_table.table([record("ce", 0, 0.5), record("dice", 0, 0.48)], "looped digits")
        assert lines[2][-1] == "\N{MINUS SIGN}2.0"


class TestSummary:
    def test_has_what_all_tasks_share(self):
        runs = [record("ce", seed, 0.5) for seed in range(3)] + [record("lovasz-batch", 0, 0.52)]
        runs += [record("ce", 0, 0.6, "all digits"), record("lovasz-present-batch", 0, 0.55, "all digits")]
        runs += [record("ce>lovasz-all-batch", 0, 0.7, "all digits")]
        assert evidence_table.summary_table(runs) == [
            ["training", "looped digits", "all digits"],
            ["cross-entropy", "50.0", "60.0"],
            ["Lovász", "52.0 (+2.0)", "55.0 (\N{MINUS SIGN}5.0)"],
        ]


class TestRates:
    def search(self, best):
        """Run the search on a made-up curve with its peak at the given place of the ladder."""
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

    def test_nan_is_never_the_best(self):
        sweep = [record("ce", 1000, iou, rates=[rate]) for rate, iou in ((0.01, float("nan")), (0.003, 0.0))]
        assert evidence.best_rate(evidence.tried_rates(sweep)["looped digits", "ce"]) == 0.003


@pytest.fixture
def small(monkeypatch, tmp_path):
    """The comparison with few seeds and tiny runs."""
    monkeypatch.setattr(evidence, "SETTINGS", {"size": 32, "scenes": [8, 2, 2], "batch_size": 2, "steps": [2, 1]})
    monkeypatch.setattr(evidence, "CHECKPOINTS", tmp_path)
    evidence.scenes.cache_clear()
    yield tmp_path / "runs.jsonl"
    evidence.scenes.cache_clear()


class TestRuns:
    def sweep(self):
        return [
            record(arm, evidence.SWEEP_SEED, 0.5, task, rates=[0.01])
            for task, arms in evidence.ARMS.items()
            for arm in arms
        ]

    @pytest.mark.parametrize("task", evidence.TASKS)
    def test_every_arm_runs_and_is_not_run_again(self, task, small):
        jobs = [j for j in evidence.comparison_jobs([], self.sweep()) if j["task"] == task and j["seed"] == 0]
        assert sum(evidence.run_job(job, small) for job in jobs) == len(evidence.ARMS[task])
        done = evidence.read(small)
        assert sorted(run["arm"] for run in done) == sorted(evidence.ARMS[task])
        assert all(0 <= value <= 1 for run in done for name, value in run.items() if name.endswith(("half", "best")))
        left = evidence.comparison_jobs(done, self.sweep())
        assert not [job for job in left if job["task"] == task and job["seed"] == 0]
        assert len(left) == len(evidence.comparison_jobs([], self.sweep())) - len(jobs)

    def test_two_stages_share_the_first(self, small, monkeypatch):
        losses = []
        original = evidence.train
        monkeypatch.setattr(
            evidence, "train", lambda *args, **options: losses.append(options["steps"]) or original(*args, **options)
        )
        runs = [(arm, [0.01, 0.001]) for arm in ("ce>ce", "ce>lovasz-batch")]
        evidence.run_job({"task": "looped digits", "seed": 0, "runs": runs}, small)
        assert losses == [2, 1, 1]

    def test_repeats_exactly(self, small):
        """An interrupted run that starts again ends as it would have."""
        for _ in range(2):
            evidence.run_job({"task": "looped digits", "seed": 0, "runs": [("ce>lovasz-image", [0.01, 0.001])]}, small)
            for path in small.parent.glob("*.pt"):
                path.unlink()
        one, two = evidence.read(small)
        assert one["threshold"] == two["threshold"]
        assert one["test at best"] == two["test at best"]

    def test_results_of_other_settings_are_refused(self, small):
        small.write_text(json.dumps(record("ce", 0, 0.5, settings={"size": 999})) + "\n")
        with pytest.raises(SystemExit, match="other settings"):
            evidence.read(small)

    def test_dice(self):
        """Of the batch as a whole: 1 - 2 |A n B| / (|A| + |B|) where the prediction is certain."""
        loss = evidence.make_loss(evidence.TASKS["looped digits"], "dice")
        labels = torch.tensor([[[1, 1, 0, 0]], [[0, 0, 0, 1]]])
        predicted = torch.tensor([[[1, 0, 0, 0]], [[1, 1, 0, 1]]])
        value = loss(200.0 * predicted[:, None] - 100, labels)
        assert value.item() == pytest.approx(1 - 2 * 2 / (3 + 4), abs=1e-5)


class TestCommitted:
    """The results in the repository and what is made of them."""

    def test_runs_are_those_of_the_comparison_and_each_is_there_once(self):
        found = [(run["task"], run["arm"], run["seed"]) for run in evidence.read(evidence_table.RUNS)]
        expected = [
            (task, arm, seed) for task in evidence.TASKS for arm in evidence.ARMS[task] for seed in evidence.SEEDS
        ]
        assert sorted(found) == sorted(expected)
        assert len(evidence.SEEDS) >= 5

    def test_rates_are_those_of_the_search(self):
        tried = evidence.tried_rates(evidence.read(evidence_table.SWEEP))
        for run in evidence.read(evidence_table.RUNS):
            source = evidence.rate_from(run["task"], run["arm"])
            assert run["rates"][-1] == evidence.best_rate(tried[run["task"], source])
            assert set(evidence.next_rates(tried[run["task"], source], ())) == set()

    def test_readme_is_up_to_date(self):
        readme = (evidence_table.ROOT / "README.md").read_text(encoding="utf-8")
        assert evidence_table.readme_block(evidence_table.read()) in readme
