// The bars of EasyRef MLLM Layers: one for each hidden state of the MLLM, for text and for pictures.
// Shows what it is given and has no state of its own.

import { make, makeSvg } from "./page.js";
import { makeBand, round } from "./plot_band.js";

const NAMES = ["text", "picture"];
const GAP = 0.2; // between bars, as a part of a bar's place

export const HEIGHT = 104; // as in web/css/plots.css

export class LayerBars {
  /** @param t the page's texts. */
  constructor(t) {
    this.t = t;
    this.rows = NAMES.map((name) => new Row(name, t(name)));
    this.element = make(
      "div",
      { class: "easyref-plot easyref-layers", role: "img", tabindex: "0" },
      ...this.rows.map((row) => row.element),
      make("div", { class: "easyref-ends" }, ...["first", "last"].map((end) => make("span", {}, t(end)))),
    );
  }

  /** @param bars name -> {factors, attention}, or {problem}, the name of a text. */
  show(bars) {
    const all = NAMES.flatMap((name) => bars[name].factors ?? []);
    const said = this.rows.map((row, index) => {
      const name = NAMES[index];
      const words = wordsOf(bars[name], this.t);
      row.show(bars[name].factors ?? [], Math.max(1, ...all), words);
      return `${this.t(name)}: ${words}`;
    });
    this.element.setAttribute("aria-label", `${this.t("layers")}. ${said.join(". ")}.`);
  }
}

class Row {
  constructor(name, label) {
    this.words = make("span", { class: "easyref-span" });
    this.svg = makeSvg("svg", { preserveAspectRatio: "none" });
    this.element = makeBand({ "data-row": name }, label, this.words, this.svg);
  }

  show(factors, highest, words) {
    this.words.textContent = words;
    this.svg.setAttribute("viewBox", `0 0 ${factors.length || 1} 1`);
    this.svg.replaceChildren(...factors.map((factor, index) => bar(index, factor / highest)));
  }
}

function bar(index, height) {
  return makeSvg("rect", { x: index + GAP / 2, y: 1 - height, width: 1 - GAP, height });
}

function wordsOf({ factors, attention, problem }, t) {
  if (problem) return t(problem);
  const turns = [Math.min(...factors), Math.max(...factors)].map((value) => factors.indexOf(value));
  const places = [0, ...turns, factors.length - 1].sort((a, b) => a - b);
  const ends = places.map((place) => round(factors[place]));
  const course = ends.filter((value, index) => value !== ends[index - 1]);
  return t("factors", { factors: course.join(" – "), attention: round(attention) });
}
