// What the plots on nodes have in common.

import { make } from "./page.js";

/** A band of a plot: its name, what it shows in words, and its drawing. */
export function makeBand(data, name, words, svg) {
  return make("div", { class: "easyref-band", ...data }, make("span", { class: "easyref-name" }, name), words, svg);
}

/** A number as text, with two decimals at most. */
export const round = (value) => String(Number(Number(value).toFixed(2)));
