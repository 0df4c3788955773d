"""The prompts of the proof: texts of different kinds, written for this project."""

LONG_PROMPT = (
    "The mill stood where the valley narrowed, and for as long as anyone could remember it had "
    "ground the corn of three parishes. In dry summers the wheel turned so slowly that the "
    "miller's children could count its paddles; in spring, when the snow came down all at once, "
    "the whole building shook and flour drifted from the rafters. The miller kept a ledger in "
    "which every sack was entered twice, once when it arrived as grain and once when it left as "
    "meal, and the difference between the two columns was the only wage he ever took. One year "
    "the difference vanished. Sacks went out exactly as heavy as they had come in. He weighed "
    "the scales against a stone, and the stone against the scales of the next village, and "
    "found nothing wrong with either. His wife said that he should be glad of honest customers. "
    "His eldest son said that the mice had at last been caught. The miller said nothing, but "
    "sat up all night beside the hopper with a lantern under his coat, listening to the water. "
    "Towards morning the wheel stopped by itself, though the sluice was open, and in the "
    "silence he heard someone on the other side of the wall counting under his breath: "
    "nineteen, twenty, twenty-one. When he opened the door there was nobody there, only the wet "
    "prints of bare feet that led across the boards, down the steps and into the mill race, "
    "each a little smaller than the one before it. He followed them to the edge and"
)
PROMPTS = (  # (kind, text)
    ("prose", "Once upon a time, there was a lighthouse keeper who"),
    ("code", "def fibonacci(n):\n    if n < 2:\n        return n\n    return"),
    ("digits", "17 + 25 = 42\n18 + 25 = 43\n19 + 25 ="),
    ("300 tokens", LONG_PROMPT),
    ("one token", "The"),
    ("one space", " "),
    ("white space", "a\n  5\n\n   6\t\t7\n"),
    ("fact", "The capital of France is"),
    ("list", "1. Wash the rice.\n2. Boil the water.\n3."),
    ("question", "Q: Why is the sky blue?\nA:"),
    ("dialogue", '"Where were you?" she asked. "We waited until'),
    ("JSON", '{"name": "Ada", "born": 1815, "fields": ['),
    ("HTML", '<ul>\n  <li><a href="/index.html">Home</a></li>\n'),
    ("C", "#include <stdio.h>\n\nint main(void) {\n    for (int i = 0; i < 10; i++)"),
    ("French", "Il était une fois, dans une forêt très éloignée,"),
    ("Greek", "Ἐν ἀρχῇ ἦν ὁ λόγος, καὶ"),
    ("Russian", "Жил-был в одной деревне старый"),
    ("Chinese", "从前有座山，山里有座庙，"),
    ("emoji", "Weather today: ☀️🌧️🌈 and tomorrow: "),
    ("markdown", "# Results\n\n| model | loss |\n|---|---|\n| ours |"),
)
