"""The leaderboard and the page of trials whose curves are written by hand."""

from agents.benchmark.command import main
from agents.benchmark.report import leaderboard, standings, write_report
from agents.benchmark.score import read_trials

from .test_score import ROWS, write_trial


def trials_in(folder):
    for seed in range(3):
        write_trial(folder / f"a_{seed}", algorithm="Able", seed=seed, rows=ROWS)
        write_trial(folder / f"b_{seed}", algorithm="Baker", seed=seed, rows=ROWS[:2])
    write_trial(folder / "c", algorithm="Cheat", rows=ROWS, problems=["700 images were judged"])
    return read_trials([folder])


def test_the_best_score_stands_first(tmp_path):
    board = standings(trials_in(tmp_path), "emoji")
    assert [one.algorithm for one in board] == ["Able", "Cheat", "Baker"]
    assert board[0].median("cpu_seconds") == 40
    assert board[0].queries == 320


def test_the_leaderboard_has_a_line_for_each_and_marks_those_out_of_the_protocol(tmp_path):
    text = leaderboard(trials_in(tmp_path))
    assert "| Able | 3 | +15.0 | +15.0 … +15.0 | 320 | +40.0 |" in text
    assert "| Cheat (!) | 1 |" in text


def test_the_page_is_one_file_that_shows_all(tmp_path):
    page = write_report(trials_in(tmp_path))
    for text in ("Able", "Baker", "seed 0: 700 images were judged", "+15.0", "Performance profiles"):
        assert text in page
    assert page.count("data:image/svg+xml") == 3
    assert 'src="http' not in page


def test_the_command_writes_the_page(tmp_path, capsys):
    trials_in(tmp_path / "runs")
    main(["report", str(tmp_path / "runs")])
    assert (tmp_path / "runs" / "report.html").read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    assert "### emoji" in capsys.readouterr().out
