#!/usr/bin/env python3
"""Draw the pictures and clips of examples/samples, and write the sample files that ask about them.

    python examples/make_samples.py --out samples

Reads   nothing
Writes  OUT/pictures/*.png, OUT/clips/*.mp4, and OUT/{x2t_image,x2t_video,i2v,image_edit,video_edit}.json, as committed
        in examples/samples; the prompts beside them, t2i.json and t2v.json, are written by hand
Next    awq_calibrate_single.py --task all --example_json examples/samples
"""

import argparse
import colorsys
import math
from collections.abc import Callable
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from lance_quant.cli import script
from lance_quant.lance.media.video import write_video
from lance_quant.storage.atomic import whole_folder, write_json

LOOK = "Look at the image carefully and answer the question."
WATCH = "Watch the video carefully and answer the question."
Draw = Callable[[], Image.Image]


def canvas(width: int, height: int, color: str = "white") -> tuple[Image.Image, ImageDraw.ImageDraw]:
    """An empty picture and its pen."""
    image = Image.new("RGB", (width, height), color)
    return image, ImageDraw.Draw(image)


def write(pen: ImageDraw.ImageDraw, at: tuple[int, int], text: str, size: int = 24, color: str = "black") -> None:
    """Text, centred at a point."""
    pen.text(at, text, color, ImageFont.load_default(size), anchor="mm")


def shapes() -> Image.Image:
    image, pen = canvas(480, 360, "#f4efe6")
    pen.ellipse((40, 60, 180, 200), "#d62828")
    pen.rectangle((220, 90, 340, 210), "#1d4ed8")
    pen.polygon([(390, 220), (460, 220), (425, 110)], "#2a9d3f")
    write(pen, (240, 300), "RED  BLUE  GREEN", 30)
    return image


def bars() -> Image.Image:
    image, pen = canvas(560, 400)
    for index, (name, value) in enumerate((("Mon", 30), ("Tue", 55), ("Wed", 20), ("Thu", 80), ("Fri", 45))):
        left = 70 + 95 * index
        pen.rectangle((left, 340 - 3 * value, left + 60, 340), "#457b9d")
        write(pen, (left + 30, 360), name, 20)
        write(pen, (left + 30, 325 - 3 * value), str(value), 18)
    write(pen, (280, 30), "Visitors per day", 28)
    return image


def clock() -> Image.Image:
    image, pen = canvas(360, 360, "#dfe7ef")
    pen.ellipse((30, 30, 330, 330), "white", "black", 6)
    for hour in range(1, 13):
        angle = math.radians(30 * hour - 90)
        write(pen, (round(180 + 120 * math.cos(angle)), round(180 + 120 * math.sin(angle))), str(hour), 24)
    for angle, length, width in ((30 * 4.5 - 90, 65, 9), (180 - 90, 100, 5)):  # half past four
        end = (180 + length * math.cos(math.radians(angle)), 180 + length * math.sin(math.radians(angle)))
        pen.line([(180, 180), end], "black", width)
    return image


def sign() -> Image.Image:
    image, pen = canvas(640, 320, "#9fc6e0")
    pen.rectangle((60, 50, 580, 190), "#1b6b3a", "white", 6)
    write(pen, (320, 95), "HARBOUR  3 km", 44, "white")
    write(pen, (320, 150), "OLD TOWN  7 km", 34, "white")
    pen.rectangle((300, 190, 340, 320), "#777777")
    return image


def landscape() -> Image.Image:
    image, pen = canvas(640, 360)
    for row in range(360):
        mix = row / 360
        pen.line([(0, row), (640, row)], tuple(round(a + (b - a) * mix) for a, b in
                                               ((250, 90), (170, 60), (90, 120))))
    pen.ellipse((420, 120, 520, 220), "#ffe9a8")
    for height, color, phase in ((210, "#5b4a70", 0.0), (260, "#3d3356", 1.7), (310, "#241f38", 3.1)):
        ridge = [(x, height + 30 * math.sin(x / 70 + phase) + 12 * math.sin(x / 23 + phase)) for x in range(0, 641, 4)]
        pen.polygon([*ridge, (640, 360), (0, 360)], color)
    return image


def receipt() -> Image.Image:
    image, pen = canvas(300, 480, "#fbfaf5")
    write(pen, (150, 40), "CORNER BAKERY", 28)
    for index, (what, price) in enumerate((("Rye bread", "4.20"), ("Two rolls", "1.60"), ("Apple tart", "3.50"))):
        pen.text((25, 100 + 45 * index), what, "black", ImageFont.load_default(22))
        pen.text((215, 100 + 45 * index), price, "black", ImageFont.load_default(22))
    pen.line([(25, 250), (275, 250)], "black", 2)
    write(pen, (150, 285), "TOTAL  9.30", 30)
    write(pen, (150, 420), "Thank you!", 22)
    return image


def chessboard() -> Image.Image:
    image, pen = canvas(400, 400)
    for row in range(8):
        for column in range(8):
            box = (50 * column, 50 * row, 50 * column + 49, 50 * row + 49)
            pen.rectangle(box, "#eed9b6" if (row + column) % 2 == 0 else "#8a5a33")
    for row, column, color in ((0, 3, "black"), (7, 4, "white"), (4, 4, "white")):
        pen.ellipse((50 * column + 8, 50 * row + 8, 50 * column + 42, 50 * row + 42), color, "gray", 2)
    return image


def pie() -> Image.Image:
    image, pen = canvas(480, 360)
    start = -90.0
    for name, share, color in (("rail", 50, "#e76f51"), ("road", 30, "#2a9d8f"), ("air", 20, "#e9c46a")):
        pen.pieslice((90, 50, 350, 310), start, start + 3.6 * share, color, "white", 3)
        angle = math.radians(start + 1.8 * share)
        write(pen, (round(220 + 80 * math.cos(angle)), round(180 + 80 * math.sin(angle))), f"{name} {share}%", 20)
        start += 3.6 * share
    write(pen, (240, 25), "How the goods travelled", 24)
    return image


def traffic_light() -> Image.Image:
    image, pen = canvas(270, 480, "#b8d4e8")
    pen.rounded_rectangle((75, 40, 195, 380), 20, "#222222")
    for index, color in enumerate(("#4a1212", "#5a4a10", "#28d24a")):
        pen.ellipse((95, 60 + 105 * index, 175, 140 + 105 * index), color)
    pen.rectangle((125, 380, 145, 480), "#444444")
    return image


def houses() -> Image.Image:
    image, pen = canvas(640, 350, "#bfe3f5")
    pen.rectangle((0, 230, 640, 350), "#6aa84f")
    for index, color in enumerate(("#e07a5f", "#f2cc8f", "#81b29a", "#e07a5f")):
        left = 30 + 150 * index
        pen.rectangle((left, 130, left + 120, 240), color)
        pen.polygon([(left - 10, 130), (left + 130, 130), (left + 60, 70)], "#7f4f24")
        pen.rectangle((left + 45, 180, left + 75, 240), "#4a2c12")
        pen.rectangle((left + 10, 150, left + 35, 172), "#fff3b0" if index != 2 else "#333333")
    return image


def table() -> Image.Image:
    image, pen = canvas(560, 320)
    rows = (("City", "Trams", "Buses"), ("Arden", "12", "40"), ("Belmont", "8", "75"), ("Corvo", "21", "33"))
    for row, cells in enumerate(rows):
        for column, cell in enumerate(cells):
            box = (20 + 175 * column, 20 + 70 * row, 195 + 175 * column, 90 + 70 * row)
            pen.rectangle(box, "#dde5ee" if row == 0 else "white", "black", 2)
            write(pen, (108 + 175 * column, 55 + 70 * row), cell, 26)
    return image


def dots() -> Image.Image:
    image, pen = canvas(360, 480, "#20242c")
    for x, y in ((60, 70), (180, 60), (290, 110), (90, 190), (210, 220), (300, 300), (70, 350), (180, 410)):
        pen.ellipse((x - 24, y - 24, x + 24, y + 24), "#ffb703" if x < 250 else "#fb5607")
    return image


def thermometer() -> Image.Image:
    image, pen = canvas(220, 480)
    pen.rounded_rectangle((90, 40, 130, 400), 20, "#eeeeee", "black", 3)
    pen.ellipse((75, 380, 145, 450), "#d62828", "black", 3)
    pen.rectangle((100, 220, 120, 400), "#d62828")
    for step, degrees in enumerate(range(40, -11, -10)):
        pen.line([(130, 70 + 60 * step), (150, 70 + 60 * step)], "black", 2)
        write(pen, (180, 70 + 60 * step), str(degrees), 22)
    return image


def code() -> Image.Image:
    image, pen = canvas(640, 280, "#1e1e2e")
    for row, (text, color) in enumerate((("def area(width, height):", "#89b4fa"), ("    if width < 0:", "#cdd6f4"),
                                         ("        raise ValueError", "#f38ba8"),
                                         ("    return width * height", "#a6e3a1"))):
        pen.text((30 + 20 * (len(text) - len(text.lstrip())) // 2, 40 + 50 * row), text.strip(), color,
                 ImageFont.load_default(26))
    return image


def route() -> Image.Image:
    image, pen = canvas(560, 400, "#eef3e2")
    stops = {"Mill": (70, 320), "Bridge": (190, 200), "Church": (330, 240), "School": (470, 90)}
    pen.line(list(stops.values()), "#c1121f", 8)
    pen.line([(0, 60), (200, 130), (330, 380), (400, 400)], "#4ea5d9", 18)
    for name, (x, y) in stops.items():
        pen.ellipse((x - 12, y - 12, x + 12, y + 12), "white", "black", 4)
        write(pen, (x, y - 30), name, 22)
    return image


def wheel() -> Image.Image:
    image, pen = canvas(400, 400, "#fafafa")
    for step in range(36):
        color = tuple(round(255 * part) for part in colorsys.hsv_to_rgb(step / 36, 0.85, 0.95))
        pen.pieslice((30, 30, 370, 370), 10 * step, 10 * step + 10, color)
    pen.ellipse((130, 130, 270, 270), "#fafafa")
    return image


# Picture -> how it is drawn, and (question, reference answer) pairs about it.
PICTURES: dict[str, tuple[Draw, list[tuple[str, str]]]] = {
    "shapes": (shapes, [("Which shape is left of the square?", "A red circle."),
                        ("What is written below the shapes?", "RED BLUE GREEN")]),
    "bars": (bars, [("On which day were there the most visitors, and how many?", "Thursday, 80."),
                    ("How many more visitors came on Tuesday than on Monday?", "25 more."),
                    ("Describe this chart in two or three sentences.",
                     "A bar chart titled Visitors per day shows Monday to Friday. Thursday is the highest with 80 and "
                     "Wednesday the lowest with 20.")]),
    "clock": (clock, [("What time does the clock show?", "Half past four."),
                      ("How many hands does the clock have?", "Two.")]),
    "sign": (sign, [("How far is the harbour?", "3 km."),
                    ("Transcribe the whole sign.", "HARBOUR 3 km, OLD TOWN 7 km"),
                    ("路牌是什么颜色的?", "绿色。")]),
    "landscape": (landscape, [("Describe the mood and the colours of this picture.",
                               "A calm sunset: a pale sun stands in an orange to violet sky above three dark ridges."),
                              ("How many ridges of hills can you see?", "Three.")]),
    "receipt": (receipt, [("What is the total on the receipt?", "9.30"),
                          ("Which item costs the most?", "The rye bread, 4.20."),
                          ("Was kostet der Apfelkuchen?", "3,50.")]),
    "chessboard": (chessboard, [("How many pieces stand on the board?", "Three."),
                                ("What color is the piece in the top row?", "Black.")]),
    "pie": (pie, [("Which way of transport has the smallest share?", "Air, 20 percent."),
                  ("Explain step by step how the shares of road and air compare with that of rail.",
                   "Road has 30 percent and air 20 percent. Together they have 50 percent, exactly as much as rail.")]),
    "traffic_light": (traffic_light, [("May I drive?", "Yes, the light is green."),
                                      ("Which of the three lamps is lit?", "The lowest one.")]),
    "houses": (houses, [("How many houses are there?", "Four."),
                        ("Which house has a dark window?", "The third from the left."),
                        ("¿De qué color es el césped?", "Verde.")]),
    "table": (table, [("Which city has the most trams?", "Corvo, with 21."),
                      ("How many buses run in Belmont?", "75."),
                      ("Read the table and write it as one sentence per city.",
                       "Arden has 12 trams and 40 buses. Belmont has 8 trams and 75 buses. Corvo has 21 trams and 33 "
                       "buses.")]),
    "dots": (dots, [("How many dots are there in all?", "Eight."), ("How many dots are orange-red?", "Two.")]),
    "thermometer": (thermometer, [("What temperature is shown?", "About 15 degrees."),
                                  ("Is it freezing?", "No.")]),
    "code": (code, [("What does this function return?", "The product of width and height."),
                    ("When does it raise an error?", "If the width is negative.")]),
    "route": (route, [("Which stop comes after Bridge on the way from Mill?", "Church."),
                      ("What does the blue line stand for, most likely?", "A river.")]),
    "wheel": (wheel, [("What is shown here?", "A color wheel."),
                      ("What shape is cut out of its middle?", "A circle.")]),
}
EDITS = [("shapes", "Make the circle yellow and leave everything else as it is."),
         ("houses", "Turn the scene into night, with a full moon and lit windows."),
         ("landscape", "Replace the sun by a hot-air balloon."),
         ("sign", "Change the text HARBOUR to AIRPORT."),
         ("dots", "把所有的圆点变成星星。"),
         ("traffic_light", "Switch the light to red."),
         ("receipt", "Crumple the paper slightly and put it on a wooden table."),
         ("wheel", "Render it as a watercolor painting.")]
FIRST_FRAMES = [("landscape", "The sun slowly sinks behind the ridges while the sky turns dark."),
                ("houses", "Snow begins to fall, the camera moves slowly to the right."),
                ("traffic_light", "The light changes from green to yellow and then to red."),
                ("wheel", "The color wheel spins faster and faster.")]


def bouncing(at: float) -> Image.Image:
    image, pen = canvas(320, 240, "#cfe8f3")
    pen.rectangle((0, 200, 320, 240), "#7a9e5f")
    x, y = 30 + 260 * at, 170 - 110 * abs(math.sin(3 * math.pi * at))
    pen.ellipse((x - 22, y - 22, x + 22, y + 22), "#d62828")
    return image


def counting(at: float) -> Image.Image:
    image, pen = canvas(240, 240, "#fff7e0")
    write(pen, (120, 120), str(1 + min(4, int(5 * at))), 150, "#1d3557")
    return image


def rotating(at: float) -> Image.Image:
    image, pen = canvas(256, 256, "#222831")
    corners = [(128 + 90 * math.cos(angle), 128 + 90 * math.sin(angle))
               for angle in (math.pi * at + k * math.pi / 2 for k in range(4))]
    pen.polygon(corners, "#00adb5")
    return image


def sunrise(at: float) -> Image.Image:
    image, pen = canvas(336, 192, tuple(round(40 + (value - 40) * at) for value in (150, 200, 250)))
    y = 190 - 150 * at
    pen.ellipse((140, y - 26, 192, y + 26), "#ffcf56")
    pen.polygon([(0, 192), (0, 150), (110, 110), (220, 160), (336, 120), (336, 192)], "#2d4a3e")
    return image


# Clip -> its frames as a function of time 0..1, its length in frames, questions about it, and how to edit it.
CLIPS: dict[str, tuple[Callable[[float], Image.Image], int, list[tuple[str, str]], str]] = {
    "bouncing": (bouncing, 36, [("How often does the ball touch the ground?", "Four times, counting start and end."),
                                ("In which direction does the ball move?", "To the right.")],
                 "Turn the red ball into a blue cube."),
    "counting": (counting, 30, [("Which numbers appear, in order?", "1, 2, 3, 4, 5."),
                                ("What is the last number?", "5.")],
                 "Make the digits golden."),
    "rotating": (rotating, 24, [("What does the square do?", "It turns clockwise by half a turn."),
                                ("What color is the background?", "Dark gray.")],
                 "Replace the background by a starry sky."),
    "sunrise": (sunrise, 48, [("Describe what happens in this video.",
                               "The sun rises behind green hills, and the sky grows lighter until it is blue."),
                              ("Does the sky become lighter or darker?", "Lighter.")],
                "Let it rain throughout the clip."),
}


def question(visual: str, kind: str, system: str, text: str, answer: str) -> dict:
    """An x2t entry of a sample file."""
    return {"interleave_array": [visual, [system, text, answer]], "element_dtype_array": [kind, "text"],
            "istarget_in_interleave": [0, 1]}


def instruction(visual: str, kind: str, text: str) -> dict:
    """An edit or i2v entry of a sample file."""
    return {"interleave_array": [text, visual], "element_dtype_array": ["text", kind],
            "istarget_in_interleave": [0, 0]}


def numbered(entries: list[dict]) -> dict[str, dict]:
    """Entries under the keys "0001", "0002", ..."""
    return {f"{number:04d}": entry for number, entry in enumerate(entries, 1)}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = script.parser(__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder to create")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Draw everything and write the sample files."""
    args = parse_args(argv)
    with whole_folder(args.out) as folder:
        (folder / "pictures").mkdir()
        (folder / "clips").mkdir()
        for name, (draw, _) in PICTURES.items():
            draw().save(folder / f"pictures/{name}.png", optimize=True)
        for name, (frame, length, _, _) in CLIPS.items():
            write_video(folder / f"clips/{name}.mp4", [frame(index / (length - 1)) for index in range(length)])
        files = {
            "x2t_image": [question(f"pictures/{name}.png", "image", LOOK, *pair)
                          for name, (_, pairs) in PICTURES.items() for pair in pairs],
            "x2t_video": [question(f"clips/{name}.mp4", "video", WATCH, *pair)
                          for name, (_, _, pairs, _) in CLIPS.items() for pair in pairs],
            "i2v": [instruction(f"pictures/{name}.png", "image", text) for name, text in FIRST_FRAMES],
            "image_edit": [instruction(f"pictures/{name}.png", "image", text) for name, text in EDITS],
            "video_edit": [instruction(f"clips/{name}.mp4", "video", text) for name, (_, _, _, text) in CLIPS.items()],
        }
        for task, entries in files.items():
            write_json(folder / f"{task}.json", numbered(entries))
    print(args.out)


if __name__ == "__main__":
    script.run(main)
