"""What torture.py counts, in small."""

import fuzz
import torture


def test_killed_anywhere_nothing_is_lost_and_no_bit_differs():
    with torture.world() as place:
        done = torture.kills(place, 55)
        (path,) = place.folder.glob(f"left-alone/checkpoints/*/checkpoint_{torture.LAST}.pt")
        damage = torture.flips(path, 200)
    assert done["kills"] >= 55 and done["kinds of event"] == 11
    assert 150 < damage["refused"] <= 200


def test_25_chained_resumes_in_new_processes_leave_no_trace():
    with torture.world() as place:
        torture.chain(place, 25)


def test_whatever_is_given_nothing_but_one_line_comes_back(reference, tmp_path):
    assert fuzz.fuzz_yaml(tmp_path, 200) >= 200
    assert fuzz.fuzz_text(tmp_path, reference, 200) >= 200
    assert fuzz.fuzz_prompts(reference, 200) >= 200
