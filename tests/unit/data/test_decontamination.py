import numpy as np
import pytest
from clean_runs import chat, groups_of, run_clean, source_of

from finetune.data.cleaning.decontamination import _bit_map, _is_set

QUIZ = source_of("quiz", use="decontamination")
RULES = {"languages": None, "near_duplicates": None, "min_record_characters": 1, "min_answer_characters": 1}


def numbered(first, last):
    return " ".join(f"w{number}" for number in range(first, last))


def reasons(tmp_path, train, quiz, **rules):
    """Line of a training row -> why it was dropped; none of the rows is held out."""
    rows = [{**row, "group": group} for row, group in zip(train, groups_of("train", len(train)), strict=True)]
    run = run_clean(tmp_path, {"a": rows, "quiz": quiz}, [source_of("a"), QUIZ], **{**RULES, **rules})
    return {line: row["reason"] for (_, line), row in run.dropped().items()}


OTHER = chat("Something else?", "Nothing in common")
TRAINED = {**OTHER, "group": groups_of("train", 1)[0]}


def test_thirteen_shared_words_are_contamination_and_twelve_are_not(tmp_path):
    quiz = [chat(numbered(0, 30), "ok")]
    train = [
        chat("Well?", f"It says: {numbered(5, 18).upper().replace(' ', ', ')}!"),
        chat("Well?", f"It says: {numbered(5, 17)}!"),
        OTHER,
    ]
    assert reasons(tmp_path, train, quiz) == {1: "contaminated_by_quiz"}


def test_the_repeated_record_is_named(tmp_path):
    quiz = [chat(numbered(100, 130), "ok"), chat(numbered(0, 30), "ok")]
    run = run_clean(
        tmp_path, {"a": [chat("Well?", numbered(3, 20)), TRAINED], "quiz": quiz}, [source_of("a"), QUIZ], **RULES
    )
    only = run_clean(tmp_path / "quiz", {"a": [*quiz[1:], TRAINED]}, **RULES)
    (row,) = run.rows("dropped")
    assert (row["kept_id"], row["jaccard"]) == (only.rows()[0]["id"], None)


def test_a_run_does_not_cross_turns(tmp_path):
    quiz = [chat(numbered(0, 30), "ok")]
    assert reasons(tmp_path, [chat(numbered(0, 8), numbered(8, 16)), OTHER], quiz) == {}


def test_system_prompts_tools_calls_and_results_are_no_contamination(tmp_path):
    prompt, tools = numbered(0, 30), f'[{{"name": "{numbered(50, 80)}"}}]'

    def with_tools(question, answer):
        call = {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"name": "f", "arguments": {"x": numbered(100, 130)}}],
        }
        return {
            "messages": [
                {"role": "system", "content": prompt},
                {"role": "user", "content": question},
                call,
                {"role": "tool", "content": numbered(200, 230)},
                {"role": "assistant", "content": answer},
            ],
            "tools": tools,
        }

    train = [with_tools("First question?", "First answer"), OTHER]
    assert reasons(tmp_path, train, [with_tools("Another one?", "A second answer")]) == {}


@pytest.mark.parametrize(("records", "dropped"), [(10, {1: "contaminated_by_quiz"}), (11, {})])
def test_a_run_that_many_records_of_a_set_have_is_its_template(tmp_path, records, dropped):
    quiz = [chat(f"{numbered(0, 20)} about topic{number}", "ok") for number in range(records)]
    assert reasons(tmp_path, [chat(f"{numbered(0, 20)} about cats", "Meow"), OTHER], quiz) == dropped


def test_a_text_that_was_copied_often_into_training_is_found_each_time(tmp_path):
    train = [chat(f"Question {number}?", f"{numbered(0, 20)} and {number}") for number in range(20)]
    found = reasons(tmp_path, [*train, OTHER], [chat(numbered(0, 20), "ok")])
    assert found == {line: "contaminated_by_quiz" for line in range(1, 21)}


def test_what_more_training_records_say_is_template_but_a_whole_long_question_is_not(tmp_path):
    said = [chat(f"Question {number}?", f"{numbered(0, 20)} and {number}") for number in range(21)]
    asked = [chat(numbered(50, 70).upper(), f"Answer {number}") for number in range(25)]
    quiz = [chat("Well, what?", numbered(0, 20)), chat(numbered(50, 70), "ok")]
    found = reasons(tmp_path, [*said, *asked, OTHER], quiz)
    assert found == {line: "contaminated_by_quiz" for line in range(22, 47)}


def test_where_a_template_ends_a_run_proves_by_the_words_that_are_its_own(tmp_path):
    template = [chat(f"{numbered(0, 16)} about {number}?", f"Answer {number}") for number in range(21)]
    six, seven = (chat(f"{numbered(0, 16)} {numbered(50, 50 + own)}!", "Well") for own in (6, 7))
    quiz = [chat(f"{numbered(0, 16)} {numbered(50, 70)}", "ok")]
    found = reasons(tmp_path, [*template, six, seven], quiz)
    assert found == {23: "contaminated_by_quiz"}


def test_a_fixed_instruction_leaves_the_records_in_training(tmp_path):
    rows = [chat(f"{numbered(0, 16)}: {numbered(100 * row, 100 * row + 12)}", f"Answer {row}") for row in range(1, 81)]
    run = run_clean(tmp_path, {"a": rows}, **RULES)
    assert run.numbers()["kept"] == 80
    assert run.numbers()["kept_of_split"]["train"] > 50


def test_a_short_question_of_an_evaluation_set_is_found_as_a_whole_turn(tmp_path):
    quiz = [chat("What is the capital of France?", "It is Paris, of course"), chat("Why is that?", "No reason")]
    train = [
        chat("what is the CAPITAL of France", "Paris"),
        chat("A riddle, please", "What is the capital of France?"),
        chat("So what is the capital of France?", "Paris"),
        chat("What is it?", "It is Paris, of course"),
        chat("Why is that?", "Because"),
    ]
    assert reasons(tmp_path, train, quiz) == {1: "contaminated_by_quiz", 2: "contaminated_by_quiz"}


def test_short_questions_are_found_each_and_no_other_goes(tmp_path):
    quiz = [chat(f"How many {thing} live in region number {place}?", "?") for place in range(100) for thing in "abc"]
    copied = [chat(row["messages"][0]["content"].upper(), f"So many: {n}") for n, row in enumerate(quiz)]
    others = [chat(f"How many {thing} live in town number {place}?", "Few") for place in range(100) for thing in "abc"]
    found = reasons(tmp_path, [*copied, *others], quiz)
    assert found == {line: "contaminated_by_quiz" for line in range(1, 301)}


def test_held_out_records_share_short_turns_with_training(tmp_path):
    (test,), trained = groups_of("test", 1), groups_of("train", 5)
    rows = [chat(f"Question {group}", "Oui, bien sûr, avec grand plaisir", group=group) for group in (test, *trained)]
    assert run_clean(tmp_path, {"a": rows}, **RULES).numbers()["kept"] == 6


def test_training_repeats_no_held_out_record_which_stays_itself(tmp_path):
    (test,), (validation,), (train, other, third) = (
        groups_of(name, n) for name, n in (("test", 1), ("validation", 1), ("train", 3))
    )
    rows = [
        chat("One?", f"{numbered(0, 20)} in training", group=train),
        chat("Two?", f"{numbered(0, 20)} held out", group=test),
        chat("Three?", f"{numbered(50, 70)} held out", group=validation),
        chat("Four?", f"{numbered(50, 70)} in training", group=other),
        chat("Five?", f"{numbered(90, 120)} in training", group=third),
    ]
    run = run_clean(tmp_path, {"a": rows}, **RULES)
    assert [record["group"] for record in run.rows()] == [f"a/{group}" for group in (test, validation, third)]
    assert run.numbers()["dropped"] == {"contaminated_by_held_out": 2}


def test_held_out_comes_before_evaluation_sets_and_these_in_their_order(tmp_path):
    (test,), (train, other) = groups_of("test", 1), groups_of("train", 2)
    sets = [source_of(name, use="decontamination") for name in ("late", "early")]
    rows = {
        "a": [
            chat("One?", numbered(0, 20), group=test),
            chat("Two?", f"{numbered(0, 20)} {numbered(50, 70)}", group=train),
            chat("Three?", numbered(50, 70), group=other),
            TRAINED,
        ],
        "late": [chat(numbered(40, 90), "ok")],
        "early": [chat(numbered(40, 90), "ok")],
    }
    run = run_clean(tmp_path, rows, [source_of("a"), *sets], **RULES)
    assert run.numbers()["dropped"] == {"contaminated_by_held_out": 1, "contaminated_by_late": 1}


def test_an_evaluation_set_is_judged_by_no_rule_and_written_nowhere(tmp_path):
    quiz = [chat(numbered(0, 30), "A"), b"{broken"]
    sources = [source_of("a"), QUIZ]
    rules = {**RULES, "min_answer_characters": 2, "max_quarantined_share": 0.5}
    run = run_clean(tmp_path, {"a": [TRAINED], "quiz": quiz}, sources, **rules)
    counts = run.numbers()["sources"]["quiz"]
    assert (counts["rows_in"], counts["kept"], counts["quarantined"]) == (2, 1, {"broken_json": 1})
    assert [record["source"] for record in run.rows()] == ["a"]
    assert run.rows("corpus") == []


def test_without_the_rule_nothing_is_looked_for(tmp_path):
    assert (
        reasons(tmp_path, [chat("Well?", numbered(0, 30))], [chat(numbered(0, 30), "ok")], decontamination=None) == {}
    )


def test_the_map_lets_through_all_that_is_in_it_and_little_else():
    numbers = np.random.default_rng(1).integers(0, 2**64, size=60_000, dtype=np.uint64)
    inside, outside = numbers[:20_000], numbers[20_000:]
    bitmap = _bit_map([inside[:7], inside[7:7], inside[7:]], len(inside))
    assert len(bitmap) == 2**20 / 8
    assert _is_set(bitmap, inside).all()
    assert _is_set(bitmap, outside).mean() < 0.005
