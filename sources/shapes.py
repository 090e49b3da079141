"""The sixteen classes of solids.py: what an aeroplane is made of.

    recipe(u)  ->  list of primitives, at most 15; u(lo, hi) draws a proportion of this object

Axes: z up, the front towards -y. Sizes are relative: solids.py moves and scales the object into the
unit ball. `part` picks one of the object's three colours, which are drawn per object and say
nothing about its class.

An object is fixed by its random stream, so the order of the draws in a recipe must stay as it is.
"""
import math

BOX, ELLIPSOID, FRUSTUM = range(3)      # kinds of primitive
NOTHING = -1                            # pads the rows of an object


def box(centre, half, turn=(0, 0, 0), part=0):
    """One primitive as a row of 13 numbers.

    kind, centre (3), half extents (3), turn (extrinsic xyz, radians), end radii (2), part"""
    return (BOX, *centre, *half, *turn, 1, 1, part)


def ellipsoid(centre, radii, turn=(0, 0, 0), part=0):
    """A row as box's, with radii for half extents."""
    return (ELLIPSOID, *centre, *radii, *turn, 1, 1, part)


def frustum(base, top, r0, r1=None, part=0, flat=1):
    """Truncated cone from point `base`, radius `r0`, to `top`, `r1`; a cylinder if `r1` is None.

    y is scaled by `flat`."""
    r1 = r0 if r1 is None else r1
    dx, dy, dz = (b - a for a, b in zip(base, top))
    length = math.sqrt(dx * dx + dy * dy + dz * dz)
    radius = max(r0, r1)
    half = (radius, flat * radius, length / 2)
    turn = (0, math.acos(dz / length), math.atan2(dy, dx))  # takes the z axis to base -> top
    middle = ((a + b) / 2 for a, b in zip(base, top))
    return (FRUSTUM, *middle, *half, *turn, r0 / radius, r1 / radius, part)


def legs(x, y, top, bottom, r, part=1):
    """Four of them, at (+-x, +-y)."""
    return [frustum((i * x, j * y, top), (i * x, j * y, bottom), r, 0.8 * r, part)
            for i in (-1, 1) for j in (-1, 1)]


def wheels(xs, y, z, r, width, part=2):
    """A pair at each x, `width` wide, outside +-y."""
    return [frustum((x, j * y, z), (x, j * (y + width), z), r, part=part)
            for x in xs for j in (-1, 1)]


def aeroplane(u):
    r = u(.10, .14)
    sweep = u(.15, .5)
    span = u(.45, .55)
    chord = u(.10, .16)

    def wing(x, z, span, chord, side):
        centre = (x - span * math.sin(sweep), side * span * math.cos(sweep), z)
        return box(centre, (chord, span, .025), (0, 0, side * sweep), part=1)

    body = ellipsoid((0, 0, 0), (1, r, r))
    wings = [wing(.2, 0, span, chord, 1), wing(.2, 0, span, chord, -1)]
    tail = [wing(-.75, .05, .2, .08, 1), wing(-.75, .05, .2, .08, -1)]
    fin = box((-.85, 0, .2), (.1, .025, u(.16, .24)), (0, -.3, 0), part=2)
    engines = [frustum((-.1, j * .42, -.08), (.22, j * .42, -.08), .06, part=2) for j in (-1, 1)]
    return [body, *wings, *tail, fin, *engines]


def bookshelf(u):
    w = u(.40, .55)
    d = u(.13, .2)
    h = u(.85, 1)
    n = int(u(3, 6))
    t = .035
    sides = [box((-w, 0, 0), (t, d, h)), box((w, 0, 0), (t, d, h))]
    back = box((0, d, 0), (w, .02, h), part=2)
    boards = [box((0, 0, h * (2 * i / n - 1)), (w, d, t), part=1) for i in range(n + 1)]
    return [*sides, back, *boards]


def bottle(u):
    r = u(.22, .32)
    body = u(.9, 1.2)
    neck = u(.07, .1)
    top = body + u(.2, .35)
    end = top + u(.2, .35)
    return [
        frustum((0, 0, 0), (0, 0, body), r),
        frustum((0, 0, body), (0, 0, top), r, neck),
        frustum((0, 0, top), (0, 0, end), neck),
        frustum((0, 0, end), (0, 0, end + .12), neck * 1.35, part=1),       # cap
        frustum((0, 0, .2 * body), (0, 0, .7 * body), r * 1.04, part=2),    # label
    ]


def car(u):
    w = u(.38, .45)
    h = u(.14, .18)
    nose = u(.35, .5)
    r = u(.17, .22)
    body = box((0, 0, 0), (1, w, h))
    cabin = box((nose / 2 - .3, 0, h + .14), (.38, w * .85, .15), part=1)
    windscreen = box((nose / 2 + .1, 0, h + .07), (.24, w * .84, .08), (0, .55, 0), part=1)
    return [body, cabin, windscreen, *wheels((-.6, .6), w - .1, -h, r, .14)]


def chair(u):
    w = u(.38, .48)
    back = u(.75, 1.0)
    leg = u(.65, .85)
    t = u(.05, .07)
    if u(0, 1) < .5:
        rest = [box((0, w, back / 2), (w, t, back / 2), part=1)]
    else:
        bars = [box((x * w, w, back / 2), (t, t, back / 2), part=1) for x in (-.9, 0, .9)]
        rest = [*bars, box((0, w, back), (w, t, .13))]
    return [box((0, 0, 0), (w, w, t)), *legs(w * .88, w * .88, 0, -leg, .065), *rest]


def guitar(u):
    low = u(.40, .48)
    high = u(.28, .34)
    d = u(.09, .13)
    neck = u(.8, 1.0)
    top = .75 + neck
    return [
        frustum((0, d, 0), (0, -d, 0), low),                                # body
        frustum((0, d, .48), (0, -d, .48), high),
        box((0, 0, .3), (high * .8, d, .2)),
        frustum((0, -d, .18), (0, -d - .02, .18), .14, part=2),             # hole
        box((0, -d, .45 + top / 2), (.055, .04, top / 2 - .1), part=1),     # neck
        box((0, -d, top + .45), (.11, .05, .15), part=2),                   # head
        box((0, -d - .02, -.2), (.17, .03, .04), part=1),                   # bridge
    ]


def lamp(u):
    h = u(1.0, 1.3)
    low = u(.45, .6)
    high = u(.16, .28)
    s = u(.45, .6)
    return [
        frustum((0, 0, 0), (0, 0, .09), u(.32, .42), .25),                  # foot
        frustum((0, 0, 0), (0, 0, h), .05, part=1),
        frustum((0, 0, h), (0, 0, h + s), low, high, part=2),               # shade
        ellipsoid((0, 0, u(.2, .5)), (.13, .13, .16), part=1),
    ]


def laptop(u):
    w = u(.75, .95)
    d = u(.5, .62)
    t = .045
    tilt = u(.1, .6)
    sin = math.sin(tilt)
    cos = math.cos(tilt)

    def lid(up, out, half, part):
        """A box in the plane of the screen, `up` along it, `out` in front of it."""
        return box((0, d + up * sin - out * cos, up * cos + out * sin), half, (-tilt, 0, 0), part)

    return [
        box((0, 0, 0), (w, d, t)),
        lid(d, 0, (w, t * .8, d), part=0),
        lid(d, t, (w * .88, .02, d * .84), part=1),                         # screen
        box((0, .14, t), (w * .85, d * .45, .02), part=2),                  # keys
        box((0, -d * .65, t), (w * .25, d * .2, .02), part=2),              # touch pad
    ]


def mug(u):
    r = u(.42, .55)
    h = u(.5, .65)
    reach = u(.26, .36)
    t = .075
    low = -h * u(.4, .6)
    high = h * u(.4, .65)
    points = [                                                              # of the handle, (x, z)
        (r - .05, low), (r + .7 * reach, low), (r + reach, low + .16),
        (r + reach, high - .16), (r + .7 * reach, high), (r - .05, high),
    ]
    handle = [frustum((a, 0, b), (c, 0, d), t, part=1)
              for (a, b), (c, d) in zip(points, points[1:])]
    cup = frustum((0, 0, -h), (0, 0, h), r * u(.8, 1), r)
    coffee = frustum((0, 0, h), (0, 0, h + .012), r * .86, part=2)
    return [cup, coffee, *handle]


def rocket(u):
    r = u(.18, .25)
    h = u(1.0, 1.3)
    nose = u(.4, .6)
    fin = u(.2, .3)
    around = (.5, .5 + math.pi / 2, .5 + math.pi, .5 + math.pi * 1.5)
    out = r + fin / 2
    fins = [box((math.cos(a) * out, math.sin(a) * out, .12), (fin, .03, .25), (0, .35, a), part=1)
            for a in around]
    return [
        frustum((0, 0, 0), (0, 0, h), r),
        frustum((0, 0, h), (0, 0, h + nose), r, 0, part=1),
        frustum((0, 0, -.2), (0, 0, 0), r * .95, r * .55, part=2),          # nozzle
        frustum((0, 0, .7 * h), (0, 0, .82 * h), r * 1.05, part=2),         # ring
        *fins,
    ]


def sailboat(u):
    w = u(.2, .28)
    h = u(.12, .16)
    mast = u(1.2, 1.5)
    sail = u(.5, .7)
    return [
        box((-.1, 0, 0), (.62, w, h)),
        ellipsoid((.45, 0, 0), (.55, w * .98, h * .98)),                    # bow
        frustum((0, 0, 0), (0, 0, h + mast), .035, part=2),
        frustum((-.1, 0, h + .12), (0, 0, h + mast), sail, 0, part=1, flat=.05),
    ]


def skateboard(u):
    w = u(.24, .32)
    r = u(.1, .13)
    x = u(.5, .6)
    tilt = u(.3, .6)

    def tail(side):
        centre = (side * (.72 + .2 * math.cos(tilt)), 0, .2 * math.sin(tilt))
        return box(centre, (.22, w * .92, .04), (0, -side * tilt, 0), part=1)

    board = box((0, 0, 0), (.75, w, .04))
    axles = [box((j * x, 0, -.1), (.05, w * .6, .09), part=1) for j in (-1, 1)]
    return [board, tail(1), tail(-1), *axles, *wheels((-x, x), w * .55, -.2, r, .14)]


def sofa(u):
    w = u(.75, .95)
    d = u(.36, .44)
    seat = u(.16, .2)
    back = u(.5, .65)
    arm = u(.12, .17)
    base = box((0, 0, 0), (w, d, seat))
    rest = box((0, d, back / 2), (w + arm, .13, back / 2 + seat))
    arms = [box((j * (w + arm * .5), 0, .12), (arm, d, seat + .13), part=1) for j in (-1, 1)]
    cushions = [box((j * w * .47, -.06, seat + .05), (w * .44, d * .9, .07), part=2)
                for j in (-1, 1)]
    return [base, rest, *arms, *cushions]


def table(u):
    w = u(.75, 1)
    d = u(.5, .75)
    h = u(.6, .85)
    t = u(.045, .07)
    if u(0, 1) < .3:
        return [frustum((0, 0, -t), (0, 0, t), w * .9), *legs(w * .52, w * .52, 0, -h, .075)]
    return [box((0, 0, 0), (w, d, t)), *legs(w * .88, d * .86, 0, -h, .075)]


def teddy(u):
    belly = u(.36, .44)
    head = u(.29, .35)
    limb = u(.13, .17)
    z = belly * 1.1 + head * .75
    trunk = ellipsoid((0, 0, 0), (belly, belly * .85, belly * 1.15))
    skull = ellipsoid((0, -.02, z), (head, head * .9, head * .9))
    snout = ellipsoid((0, -head * .85, z - .06), (.13, .12, .1), part=1)
    ears = [ellipsoid((j * head * .75, 0, z + head * .75), (.13, .08, .13), part=1)
            for j in (-1, 1)]
    arms = [ellipsoid((j * (belly + .12), -.1, .18), (.28, limb, limb), (0, j * .6, 0), part=2)
            for j in (-1, 1)]
    feet = [ellipsoid((j * belly * .65, -.32, -belly * .9), (limb * 1.1, .32, limb * 1.1), part=2)
            for j in (-1, 1)]
    return [trunk, skull, snout, *ears, *arms, *feet]


def train(u):
    r = u(.22, .28)
    z = .28
    cab = u(.5, .65)
    w = .3
    return [
        frustum((-.4, 0, z), (.85, 0, z), r),                               # boiler
        box((0, 0, 0), (.95, w, .07), part=1),
        box((-.62, 0, cab / 2), (.28, w, cab / 2)),
        box((-.62, 0, cab), (.36, w + .08, .04), part=1),                   # roof
        frustum((.6, 0, z), (.6, 0, z + r + u(.25, .4)), .07, .12, part=1),     # chimney
        ellipsoid((.1, 0, z + r), (.12, .12, .14), part=2),                 # dome
        *wheels((-.65, 0, .55), w - .1, -.1, .2, .12),
    ]


RECIPES = (aeroplane, bookshelf, bottle, car, chair, guitar, lamp, laptop,
           mug, rocket, sailboat, skateboard, sofa, table, teddy, train)
CLASSES = tuple(recipe.__name__ for recipe in RECIPES)
