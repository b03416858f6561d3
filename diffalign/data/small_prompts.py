"""``diffalign-small``: 104 short prompts of our own in 8 categories, to look at any model in a few minutes."""

from __future__ import annotations

_TEXT = """
people
an old fisherman mending a net on a pier
a girl with freckles laughing in the rain
portrait of a man in a green turban, soft window light
a nurse asleep on a bench in a hospital corridor
two brothers playing chess on the floor
a dancer in mid jump, side light, black background
a street musician playing the cello in a tunnel
a grandmother and a child kneading dough
a woman welding, sparks flying
a boy in a yellow raincoat holding a paper boat
a judge in red robes reading a letter
hands of a potter shaping a bowl
three friends toasting with coffee cups
animals
a red fox curled up in fresh snow
an owl on a fence post at dusk
a kitten looking into a goldfish bowl
a herd of elephants crossing a shallow river
close-up of a chameleon's eye
a border collie jumping over a stone wall
a hummingbird at a purple flower
an octopus opening a jar
a penguin wearing a knitted scarf
a horse made of driftwood on a beach
two swans on a lake in the mist
a hedgehog under autumn leaves
a bee covered in pollen, macro photograph
places
a narrow alley in an old harbour town at night
a lighthouse on a cliff in a storm
a library with a spiral staircase
terraced rice fields at sunrise
an abandoned swimming pool full of plants
a mountain hut under the milky way
a tram climbing a steep street
a desert gas station, 1960s postcard
a greenhouse in winter, warm light inside
the inside of an ice cave
a floating market seen from above
a wooden bridge in a bamboo forest
a small kitchen with blue tiles
things and food
a bowl of ramen with a soft boiled egg
a pocket watch lying on an open atlas
a bicycle leaning against a white wall
a teapot shaped like an elephant
a slice of lemon cake on a blue plate
a pair of worn leather boots
a glass chess set on a marble table
a vintage camera with a cracked lens
fresh bread in a paper bag
an umbrella left on a park bench
a jar of fireflies on a windowsill
a typewriter with a sheet of music in it
strawberries in a silver bowl, still life
counting and placing
three red apples in a row
two cats and one dog on a sofa
four candles on a birthday cake
five paper cranes hanging from a branch
a blue cup to the left of a white book
a ball under a chair
a bird above a boat
six eggs in a wicker basket
a key in front of a lock, nothing else
two trees, one with leaves and one without
a small house between two tall towers
a spoon to the right of a fork
three windows, the middle one lit
colours and materials
a green apple and a red pear
a purple bus on a yellow road
a transparent umbrella with pink dots
a black swan with a golden beak
an orange cat on a turquoise carpet
a violin made of glass
a woollen car
a copper robot holding a paper flower
a white horse with a blue mane
a leather sofa and a velvet curtain
a wooden moon over a sea of silk
a red cube on a green cylinder
a knitted cactus in a marble pot
styles
a sailing ship, woodcut
a city square, watercolour with loose brush strokes
a samurai under cherry trees, ink wash painting
a wolf howling, low polygon render
a market stall, oil painting with thick paint
a castle, pixel art
a portrait of a cat as a baroque nobleman
a train station, art deco poster
a dragon, stained glass window
a fruit bowl, cubist painting
a robot gardener, children's book illustration
a forest spirit, anime film still
a map of an invented island, old engraving
imagination
a whale swimming between skyscrapers
a tree whose leaves are open books
an astronaut riding a giant snail
a city built inside a seashell
a tea party on the surface of the moon
a staircase of clouds leading to a door
a fish reading a newspaper
a volcano erupting flowers
a train travelling through an aquarium
a giant asleep, mistaken for a hill
a clock whose hands are swords
a rabbit in a suit waiting at a bus stop
a garden that grows in zero gravity
"""

CATEGORIES = (
    "people",
    "animals",
    "places",
    "things and food",
    "counting and placing",
    "colours and materials",
    "styles",
    "imagination",
)


def small_prompts() -> list[tuple[str, str]]:
    """Prompts and their categories, in order."""
    result, category = [], ""
    for line in _TEXT.strip().splitlines():
        if line in CATEGORIES:
            category = line
        else:
            result.append((line, category))
    return result
