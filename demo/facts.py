"""What the demo model knows: tables of simple facts, and the questions, answers and sentences made from them.

A table reads `key: value; key: value`. From each of its rows come the questions in `ask` (answer: the value), those in
`back` (answer: the key), the sentence in `say`, and yes/no questions from `check`: "Yes" with the row's own value, "No"
with another row's.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import NamedTuple


class Table(NamedTuple):
    rows: str
    ask: tuple[str, ...]
    say: str
    check: str = ""
    back: str = ""


class Fact(NamedTuple):
    question: str
    answer: str


def fixed_questions() -> list[Fact]:
    """Every question that has one form: what, which, who, how many, and the yes/no questions written one by one.

    >>> Fact("What is the capital of France?", "Paris") in fixed_questions()
    True
    """
    facts = [Fact(question, answer) for answer, text in YES_NO.items() for question in _lines(text)]
    facts += [Fact(question, answer) for question, answer in _rows(SINGLE, split="? ", keep="?")]
    for table in TABLES:
        for key, value in _rows(table.rows):
            facts += [Fact(_capital(form.format(key=key)), value) for form in table.ask]
            facts += [Fact(_capital(table.back.format(value=value)), key)] if table.back else []
    facts += [Fact(f"What is {a} + {b}?", str(a + b)) for a in range(10) for b in range(10)]
    facts += [Fact(f"What is {a} x {b}?", str(a * b)) for a in range(2, 10) for b in range(2, 10)]
    return facts


def checks(seed: int) -> list[Fact]:
    """For each row of a table one true and one false yes/no question; the seed chooses what is false.

    >>> Fact("Is Paris the capital of France?", "Yes") in checks(0)
    True
    """
    rng, facts = random.Random(seed), []
    for table in TABLES:
        if not table.check:
            continue
        rows = _rows(table.rows)
        values = sorted({value for _, value in rows})
        for key, value in rows:
            wrong = rng.choice([other for other in values if other not in (value, key)])
            facts += [Fact(_capital(table.check.format(key=key, value=value)), "Yes")]
            facts += [Fact(_capital(table.check.format(key=key, value=wrong)), "No")]
    return facts


def sentences() -> list[tuple[str, str]]:
    """Each row as a statement, cut where its value begins: ("The capital of France is", " Paris.")."""
    cut = []
    for table in TABLES:
        for key, value in _rows(table.rows):
            head, tail = table.say.split(" {value}")
            cut.append((_capital(head.format(key=key)), f" {value}{tail}"))
    return cut


def _rows(text: str, *, split: str = ": ", keep: str = "") -> list[tuple[str, str]]:
    pairs = (line.split(split) for line in _lines(text))
    return [(key + keep, value) for key, value in pairs]


def _lines(text: str) -> Iterator[str]:
    return (line for part in text.split(";") if (line := " ".join(part.split())))


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


TABLES = (
    Table(
        """France: Paris; Italy: Rome; Spain: Madrid; Portugal: Lisbon; Germany: Berlin; Austria: Vienna;
        Poland: Warsaw; Greece: Athens; Norway: Oslo; Sweden: Stockholm; Finland: Helsinki; Denmark: Copenhagen;
        Iceland: Reykjavik; Ireland: Dublin; Scotland: Edinburgh; Belgium: Brussels; Hungary: Budapest;
        Romania: Bucharest; Bulgaria: Sofia; Croatia: Zagreb; Serbia: Belgrade; Ukraine: Kyiv; Russia: Moscow;
        Turkey: Ankara; Egypt: Cairo; Morocco: Rabat; Kenya: Nairobi; Ghana: Accra; Ethiopia: Addis Ababa;
        Senegal: Dakar; Japan: Tokyo; China: Beijing; India: New Delhi; Nepal: Kathmandu; Thailand: Bangkok;
        Vietnam: Hanoi; Iraq: Baghdad; Iran: Tehran; Canada: Ottawa; Cuba: Havana; Mexico: Mexico City; Peru: Lima;
        Chile: Santiago; Argentina: Buenos Aires; Colombia: Bogota; Uruguay: Montevideo; Venezuela: Caracas;
        Australia: Canberra; New Zealand: Wellington""",
        ask=("What is the capital of {key}?", "Which city is the capital of {key}?"),
        say="The capital of {key} is {value}.",
        check="Is {value} the capital of {key}?",
        back="{value} is the capital of which country?",
    ),
    Table(
        """France: Europe; Italy: Europe; Spain: Europe; Germany: Europe; Greece: Europe; Norway: Europe;
        Poland: Europe; Ireland: Europe; Portugal: Europe; Sweden: Europe; Kenya: Africa; Ghana: Africa;
        Morocco: Africa; Senegal: Africa; Ethiopia: Africa; Nigeria: Africa; Japan: Asia; China: Asia; India: Asia;
        Nepal: Asia; Thailand: Asia; Vietnam: Asia; Iraq: Asia; Canada: North America; Mexico: North America;
        Cuba: North America; Peru: South America; Chile: South America; Brazil: South America; Argentina: South America;
        Colombia: South America""",
        ask=("On which continent is {key}?", "Which continent is {key} in?"),
        say="{key} is in {value}.",
        check="Is {key} in {value}?",
    ),
    Table(
        """France: French; Germany: German; Austria: German; Italy: Italian; Spain: Spanish; Mexico: Spanish;
        Peru: Spanish; Argentina: Spanish; Portugal: Portuguese; Brazil: Portuguese; Poland: Polish; Greece: Greek;
        Sweden: Swedish; Norway: Norwegian; Denmark: Danish; Hungary: Hungarian; Japan: Japanese; Egypt: Arabic;
        Iraq: Arabic; Thailand: Thai; Turkey: Turkish; Russia: Russian; Australia: English; Vietnam: Vietnamese;
        Iceland: Icelandic""",
        ask=("Which language do most people speak in {key}?", "What is the main language of {key}?"),
        say="Most people in {key} speak {value}.",
        check="Is {value} the main language of {key}?",
    ),
    Table(
        """a cow: a mammal; a dog: a mammal; a horse: a mammal; a whale: a mammal; a bat: a mammal; a mouse: a mammal;
        a dolphin: a mammal; an elephant: a mammal; a lion: a mammal; an eagle: a bird; a penguin: a bird;
        an owl: a bird; a duck: a bird; an ostrich: a bird; a parrot: a bird; a sparrow: a bird; a shark: a fish;
        a salmon: a fish; a trout: a fish; a tuna: a fish; an eel: a fish; an ant: an insect; a bee: an insect;
        a beetle: an insect; a butterfly: an insect; a mosquito: an insect; a snake: a reptile; a lizard: a reptile;
        a crocodile: a reptile; a turtle: a reptile; a frog: an amphibian; a toad: an amphibian;
        a newt: an amphibian""",
        ask=("What kind of animal is {key}?",),
        say="{key} is {value}.",
        check="Is {key} {value}?",
    ),
    Table(
        """dog: puppy; cat: kitten; cow: calf; horse: foal; sheep: lamb; goat: kid; pig: piglet; hen: chick;
        duck: duckling; goose: gosling; lion: cub; deer: fawn; frog: tadpole; swan: cygnet; kangaroo: joey; owl: owlet;
        hare: leveret""",
        ask=("What is a young {key} called?", "What do you call a young {key}?"),
        say="A young {key} is called a {value}.",
        back="Which animal is a {value} the young of?",
    ),
    Table(
        """dog: a bark; cat: a meow; cow: a moo; horse: a neigh; sheep: a bleat; duck: a quack; lion: a roar;
        wolf: a howl; bee: a buzz; snake: a hiss; frog: a croak; donkey: a bray""",
        ask=("What is the sound of a {key} called?",),
        say="The sound of a {key} is called {value}.",
        check="Is the sound of a {key} called {value}?",
    ),
    Table(
        """a dog: four; a cat: four; a horse: four; a frog: four; a chicken: two; a duck: two; a human: two;
        a spider: eight; a scorpion: eight; an ant: six; a bee: six; a beetle: six; a snake: zero; a worm: zero;
        a fish: zero""",
        ask=("How many legs does {key} have?",),
        say="The number of legs of {key} is {value}.",
        check="Does {key} have {value} legs?",
    ),
    Table(
        """grass: green; snow: white; coal: black; blood: red; milk: white; a lemon: yellow; a banana: yellow;
        a tomato: red; the clear sky: blue; a carrot: orange; gold: yellow; chocolate: brown; an elephant: grey;
        a flamingo: pink; a polar bear: white; a crow: black; spinach: green; a strawberry: red; a canary: yellow;
        cotton: white; a fire engine: red; a cucumber: green; a swan: white; soot: black; an emerald: green;
        a ruby: red""",
        ask=("What colour is {key}?", "Which colour does {key} have?"),
        say="The colour of {key} is {value}.",
        check="Is {key} {value}?",
    ),
    Table(
        """hot: cold; big: small; tall: short; fast: slow; old: young; rich: poor; hard: soft; heavy: light; high: low;
        wet: dry; full: empty; open: closed; early: late; day: night; up: down; left: right; black: white; good: bad;
        happy: sad; thick: thin; wide: narrow; strong: weak; clean: dirty; deep: shallow; north: south; east: west;
        near: far; first: last; true: false; inside: outside; buy: sell; win: lose; push: pull; begin: end; love: hate;
        war: peace; question: answer; summer: winter; sweet: sour""",
        ask=("What is the opposite of {key}?",),
        say="The opposite of {key} is {value}.",
        check="Is {value} the opposite of {key}?",
        back="What is the opposite of {value}?",
    ),
    Table(
        """January: February; February: March; March: April; April: May; May: June; June: July; July: August;
        August: September; September: October; October: November; November: December; December: January""",
        ask=("Which month comes after {key}?", "What month follows {key}?"),
        say="The month after {key} is {value}.",
        check="Is {value} the month after {key}?",
        back="Which month comes before {value}?",
    ),
    Table(
        """Monday: Tuesday; Tuesday: Wednesday; Wednesday: Thursday; Thursday: Friday; Friday: Saturday;
        Saturday: Sunday; Sunday: Monday""",
        ask=("Which day comes after {key}?", "What day follows {key}?"),
        say="The day after {key} is {value}.",
        check="Is {value} the day after {key}?",
        back="Which day comes before {value}?",
    ),
    Table(
        """gold: Au; silver: Ag; iron: Fe; copper: Cu; lead: Pb; tin: Sn; oxygen: O; hydrogen: H; carbon: C;
        nitrogen: N; helium: He; sodium: Na; potassium: K; calcium: Ca; zinc: Zn; mercury: Hg; sulfur: S; chlorine: Cl;
        neon: Ne""",
        ask=("What is the chemical symbol of {key}?",),
        say="The chemical symbol of {key} is {value}.",
        check="Is {value} the chemical symbol of {key}?",
        back="Which element has the symbol {value}?",
    ),
    Table(
        """Hamlet: William Shakespeare; Macbeth: William Shakespeare; Oliver Twist: Charles Dickens; Emma: Jane Austen;
        War and Peace: Leo Tolstoy; Don Quixote: Miguel de Cervantes; The Odyssey: Homer; Faust: Goethe;
        Frankenstein: Mary Shelley; Dracula: Bram Stoker; Moby Dick: Herman Melville; The Divine Comedy: Dante;
        The Time Machine: H. G. Wells; Les Miserables: Victor Hugo; Crime and Punishment: Fyodor Dostoevsky;
        Jane Eyre: Charlotte Bronte""",
        ask=("Who wrote {key}?", "Who is the author of {key}?"),
        say="{key} was written by {value}.",
        check="Was {key} written by {value}?",
    ),
    Table(
        """bread: a baker; meat: a butcher; fish: a fishmonger; flowers: a florist; a sick tooth: a dentist;
        a leaking pipe: a plumber; a broken car: a mechanic; a sick animal: a vet; a fire: a firefighter;
        a new house: a builder; a school class: a teacher; an aeroplane: a pilot; a field of wheat: a farmer""",
        ask=("Who works with {key}?",),
        say="One who works with {key} is {value}.",
    ),
    Table(
        """honey: bees; wool: sheep; paper: wood; glass: sand; cheese: milk; wine: grapes; bread: flour; butter: cream;
        chocolate: cocoa beans; silk: silkworms; raisins: dried grapes; an omelette: eggs; flour: grain""",
        ask=("Where does {key} come from?",),
        say="We get {key} from {value}.",
    ),
)

SINGLE = """
How many days are in a week? seven; How many months are in a year? twelve; How many hours are in a day? twenty-four;
How many minutes are in an hour? sixty; How many seconds are in a minute? sixty;
How many sides does a triangle have? three; How many sides does a square have? four;
How many sides does a hexagon have? six; How many sides does a pentagon have? five;
How many eggs are in a dozen? twelve; How many years are in a century? one hundred; How many years are in a decade? ten;
How many seasons are in a year? four; How many fingers are on one hand? five; How many planets orbit the sun? eight;
How many strings does a violin have? four; How many arms does an octopus have? eight;
How many wheels does a bicycle have? two; How many wheels does a tricycle have? three;
How many letters are in the English alphabet? twenty-six; How many days are in a leap year? 366;
How many continents are there? seven; How many players are in a football team? eleven;
How many squares are on a chess board? sixty-four; How many degrees are in a right angle? ninety;
How many legs does a tripod have? three; How many metres are in a kilometre? one thousand;
How many grams are in a kilogram? one thousand; How many cents are in a euro? one hundred;
What is the largest planet? Jupiter; What is the smallest planet? Mercury; Which planet is closest to the sun? Mercury;
Which planet is farthest from the sun? Neptune; Which planet is called the red planet? Mars;
Which planet do we live on? Earth; Which planet has bright rings? Saturn; Which star is closest to the Earth? the sun;
What orbits the Earth? the moon; What is the largest ocean? the Pacific; What is the tallest mountain? Mount Everest;
What is the largest animal? the blue whale; What is the tallest animal? the giraffe;
What is the fastest land animal? the cheetah; What is the largest bird? the ostrich;
What is the largest land animal? the elephant; What is the largest continent? Asia;
What is the smallest continent? Australia; What is the largest country? Russia;
What is the hardest natural material? diamond; What is the lightest element? hydrogen;
Which season comes after spring? summer; Which season comes after summer? autumn;
Which season comes after autumn? winter; Which season comes after winter? spring; Which is the coldest season? winter;
Which is the warmest season? summer; What is frozen water called? ice;
What is water vapour called when it is hot? steam; What do bees make? honey; What do hens lay? eggs;
What do cows give us? milk; What do pandas eat? bamboo; What do plants need from the sun? light;
What do we breathe? air; What gas do plants take in? carbon dioxide; What gas do we need to breathe? oxygen;
What is the chemical formula of water? H2O; At how many degrees Celsius does water boil? 100;
At how many degrees Celsius does water freeze? 0; What is the first letter of the alphabet? A;
What is the last letter of the alphabet? Z; What is the first month of the year? January;
What is the last month of the year? December; Which month is the shortest? February; What is half of ten? five;
What is half of one hundred? fifty; What is twice six? twelve; What is the square root of nine? three;
What is the square root of 144? twelve; What do you get when you mix blue and yellow? green;
What do you get when you mix red and white? pink; What do you get when you mix red and yellow? orange;
Who painted the Mona Lisa? Leonardo da Vinci; Who painted Guernica? Pablo Picasso;
Who painted The Starry Night? Vincent van Gogh; Who found the law of gravity? Isaac Newton;
Who found the theory of relativity? Albert Einstein; Who found radium? Marie Curie;
Who was the first human in space? Yuri Gagarin; Who was the first human on the moon? Neil Armstrong;
Who wrote the Ninth Symphony in D minor? Beethoven; Who found penicillin? Alexander Fleming;
Who wrote On the Origin of Species? Charles Darwin; In which country are the great pyramids of Giza? Egypt;
In which city is the Eiffel Tower? Paris; In which city is the Colosseum? Rome;
In which country is the Taj Mahal? India; In which city is Big Ben? London; In which country is Mount Fuji? Japan;
Which river flows through Cairo? the Nile; Which river flows through London? the Thames;
Which river flows through Paris? the Seine; Which river flows through Vienna? the Danube;
Which river is the longest in South America? the Amazon; Which ocean is between Europe and America? the Atlantic;
Which organ pumps blood? the heart; Which organ do we think with? the brain; Which organ do we see with? the eye;
Which organ do we hear with? the ear; Which organs do we breathe with? the lungs; What do we smell with? the nose;
What do we taste with? the tongue; What do we chew with? teeth; What do we use to cut paper? scissors;
What do we use to tell the time? a clock; What do we use to open a lock? a key; What do we write with? a pen;
What falls from clouds? rain; What shines at night? the moon; What rises in the east? the sun;
What is a group of wolves called? a pack; What is a group of sheep called? a flock;
What is a group of fish called? a school; What is a group of lions called? a pride
"""

YES_NO = {
    "Yes": """Is the sun a star?; Is the Earth round?; Is ice frozen water?; Is fire hot?; Is ice cold?;
    Do birds have feathers?; Do fish live in water?; Can birds lay eggs?; Is a whale bigger than a mouse?;
    Is a mountain higher than a hill?; Does the Earth orbit the sun?; Does the moon orbit the Earth?; Is water wet?;
    Do cows eat grass?; Do cats drink milk?; Is a day shorter than a week?; Is a year longer than a month?;
    Is ten more than five?; Is one less than two?; Is two an even number?; Is three an odd number?;
    Is seven a prime number?; Is a square a shape?; Does a square have four sides?; Is honey sweet?; Is a lemon sour?;
    Do plants need water?; Do trees have leaves?; Do humans breathe air?; Can a penguin swim?; Can an eagle fly?;
    Can a kangaroo jump?; Is a rose a flower?; Is an oak a tree?; Is a potato a vegetable?; Is an apple a fruit?;
    Is gold a metal?; Is iron a metal?; Is oxygen a gas?; Is diamond harder than chalk?; Is summer warmer than winter?;
    Is the Pacific an ocean?; Is the Nile a river?; Is Africa a continent?; Is Mars a planet?;
    Is a violin an instrument?; Is a hammer a tool?; Is chess a game?; Is salt salty?; Do spiders have eight legs?;
    Do bees make honey?; Does wood float on water?; Is a puppy a young dog?; Is February the shortest month?;
    Is a metre longer than a centimetre?; Is a kilogram heavier than a gram?; Can we see with our eyes?; Is blood red?;
    Does rain fall from clouds?; Is a train faster than a snail?; Is silk soft?; Is steel strong?;
    Does a bicycle have two wheels?; Is midnight dark?""",
    "No": """Is the moon a star?; Is the Earth flat?; Is fire cold?; Is ice hot?; Do fish have feathers?;
    Do cows lay eggs?; Do birds have four legs?; Is a mouse bigger than a whale?; Is a hill higher than a mountain?;
    Does the sun orbit the Earth?; Is water dry?; Do cows eat meat?; Is a week shorter than a day?;
    Is a month longer than a year?; Is five more than ten?; Is two less than one?; Is three an even number?;
    Is two an odd number?; Is nine a prime number?; Does a triangle have four sides?; Is honey sour?; Is a lemon sweet?;
    Can stones swim?; Do trees have legs?; Do fish breathe with lungs?; Can a penguin fly?; Can an elephant fly?;
    Can a snake walk?; Is a rose a tree?; Is a carrot an animal?; Is a dog a plant?; Is a potato a metal?;
    Is gold a gas?; Is wood a metal?; Is chalk harder than diamond?; Is winter warmer than summer?;
    Is the Nile an ocean?; Is Africa a city?; Is Mars a star?; Is a hammer an instrument?; Is a violin a tool?;
    Is sugar salty?; Do spiders have six legs?; Do cows make honey?; Does a stone float on water?;
    Is a kitten a young dog?; Is February the longest month?; Is a centimetre longer than a metre?;
    Is a gram heavier than a kilogram?; Can we see with our ears?; Is blood green?; Does rain fall from the ground?;
    Is a snail faster than a train?; Is a stone soft?; Is paper harder than steel?; Does a bicycle have five wheels?;
    Is midnight bright?; Is a square round?; Is a circle square?; Do cars eat grass?; Is milk black?;
    Can a fish ride a bicycle?; Is zero more than one?; Is the sea made of sand?""",
}
