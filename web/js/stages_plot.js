// The plot of EasyRef Stages: two bands over the sampling, from noisy to clean. Shows what it is
// given and has no state of its own.

import { make, makeSvg } from "./page.js";
import { makeBand, round } from "./plot_band.js";
import { outline, weightAt } from "./windows.js";

const NAMES = ["tokens", "identity"];
const MARKS = [0, 25, 50, 75, 100]; // percent

export const HEIGHT = 92; // as in web/css/plots.css

export class StagesPlot {
  /** @param t the page's texts. */
  constructor(t) {
    this.t = t;
    this.rows = NAMES.map((name) => new Band(name, t(name)));
    this.element = make(
      "div",
      { class: "easyref-plot easyref-stages", role: "img", tabindex: "0" },
      ...this.rows.map((row) => row.element),
      make("div", { class: "easyref-axis" }, ...MARKS.map((mark) => axisMark(mark, t))),
    );
  }

  /** @param windows name -> window, see windows.js; null if it is not known. */
  show(windows) {
    const known = NAMES.map((name) => windows[name]).filter((window) => window);
    const highest = Math.max(1, ...known.map(({ weight }) => Math.abs(weight)));
    const said = this.rows.map((row, index) => {
      const window = windows[NAMES[index]];
      const words = spanWords(window, this.t);
      row.show(window, highest, words);
      return `${this.t(NAMES[index])}: ${words}`;
    });
    if (known[0]?.fade) said.push(this.t("fades", { fade: percent(known[0].fade) }));
    this.element.setAttribute("aria-label", `${this.t("stages")}. ${said.join(". ")}.`);
  }
}

/** A stage's name, its window in words and its band. */
class Band {
  constructor(name, label) {
    this.shape = makeSvg("polygon");
    this.words = make("span", { class: "easyref-span" });
    const svg = makeSvg("svg", { viewBox: "0 0 1 1", preserveAspectRatio: "none" }, this.shape);
    this.element = makeBand({ "data-stage": name }, label, this.words, svg);
  }

  show(window, highest, words) {
    this.words.textContent = words;
    const corners = (window ? outline(window) : []).map(([place, weight]) => [place, 1 - Math.abs(weight) / highest]);
    const closed = corners.length ? [[corners[0][0], 1], ...corners, [corners.at(-1)[0], 1]] : [];
    this.shape.setAttribute("points", closed.map((corner) => corner.join(",")).join(" "));
    this.element.toggleAttribute("data-negative", window?.weight < 0);
  }
}

function spanWords(window, t) {
  if (!window) return t("linked");
  const { start, end, weight } = window;
  if (!weightAt({ ...window, fade: 0 }, start)) return t(start > end ? "startAfterEnd" : "never");
  return t("span", { start: percent(start), end: percent(end), weight: round(weight) });
}

function axisMark(mark, t) {
  const ends = { 0: t("noisy"), 100: t("clean") };
  return make("span", { style: `left: ${mark}%` }, ends[mark] ?? `${mark}`);
}

const percent = (place) => round(100 * place);
