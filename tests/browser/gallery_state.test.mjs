// The gallery's plain values: node --test tests/browser/gallery_state.test.mjs

import assert from "node:assert/strict";
import { test } from "node:test";

import { moved, resized, squared, WHOLE } from "../../web/js/crop_box.js";
import * as state from "../../web/js/gallery_state.js";

const files = (pictures) => pictures.map((p) => p.file);
const three = () => state.add([], ["a.png", "b.png", "c.png"]);

test("a text comes back as it was", () => {
  const text =
    '{"version":1,"pictures":[{"file":"d/a \\"1\\" ü.png","weight":0.5,"crop":[0.1,0,0.5,1]},' +
    '{"file":"b.png","weight":1}]}';
  const { pictures, problem } = state.parse(text);
  assert.equal(problem, null);
  assert.equal(state.toText(pictures), text);
});

test("no pictures are an empty text", () => {
  assert.deepEqual(state.parse(""), { pictures: [], problem: null });
  assert.deepEqual(state.parse(" \n"), { pictures: [], problem: null });
  assert.equal(state.toText([]), "");
});

test("a text that cannot be shown in full is left alone", () => {
  assert.equal(state.parse('{"version":2,"pictures":[]}').problem, "newer");
  for (const text of [
    "{",
    "[]",
    "null",
    '{"version":1}',
    '{"version":1,"pictures":[{}]}',
    '{"version":1,"pictures":[null]}',
    '{"version":1,"pictures":[{"file":"a.png","weight":-1}]}',
    '{"version":1,"pictures":[{"file":"a.png","weight":"1"}]}',
    '{"version":1,"pictures":[{"file":"a.png","crop":[0,0,0,1]}]}',
    '{"version":1,"pictures":[{"file":"a.png","crop":[0.5,0,0.6,1]}]}',
  ]) {
    assert.equal(state.parse(text).problem, "unreadable", text);
  }
});

test("what is left out has its default", () => {
  const [first] = state.parse('{"version":1,"pictures":[{"file":"a.png"}]}').pictures;
  assert.deepEqual([first.weight, first.crop], [1, null]);
});

test("files are added behind, or at a place", () => {
  assert.deepEqual(files(three()), ["a.png", "b.png", "c.png"]);
  assert.deepEqual(files(state.add(three(), ["x.png"], 1)), ["a.png", "x.png", "b.png", "c.png"]);
});

test("one file can be there twice", () => {
  const pictures = state.add([], ["a.png", "a.png"]);
  assert.equal(state.remove(pictures, pictures[0].id).length, 1);
});

test("pictures move, and stop at the ends", () => {
  const pictures = three();
  const [a, , c] = pictures;
  assert.deepEqual(files(state.move(pictures, a.id, 2)), ["b.png", "c.png", "a.png"]);
  assert.deepEqual(files(state.move(pictures, c.id, 0)), ["c.png", "a.png", "b.png"]);
  assert.equal(state.move(pictures, a.id, -1), pictures);
  assert.equal(state.move(pictures, c.id, 9), pictures);
  assert.equal(state.move(pictures, -5, 0), pictures);
});

test("weights are numbers from 0 to 5, without noise", () => {
  const pictures = three();
  const weight = (typed) => state.setWeight(pictures, pictures[1].id, typed)[1].weight;
  assert.equal(weight("0.35"), 0.35);
  assert.equal(weight("0,35"), 0.35);
  assert.equal(weight(0.1 + 0.2), 0.3);
  assert.equal(weight("-1"), 0);
  assert.equal(weight("99"), 5);
  assert.equal(weight(""), 1);
  assert.equal(weight("x"), 1);
  assert.equal(pictures[1].weight, 1, "the old pictures are not changed");
});

test("a crop of the whole picture is none", () => {
  const pictures = three();
  const crop = (box) => state.setCrop(pictures, pictures[0].id, box)[0].crop;
  assert.deepEqual(crop([0.25, 0.125, 0.5, 0.5]), [0.25, 0.125, 0.5, 0.5]);
  assert.deepEqual(crop([0.1, 0.1, 0.95, 0.9]), [0.1, 0.1, 0.9, 0.9]);
  assert.equal(crop([0, 0, 1, 1]), null);
  assert.equal(crop([-1e-7, 0, 1, 1]), null);
  assert.equal(crop(null), null);
});

test("the gallery asks for three rows at most", () => {
  const sizes = { tile: 90, gap: 6, bar: 28, empty: 60 };
  assert.deepEqual(state.layout(0, 300, sizes), { columns: 3, height: 94 });
  assert.deepEqual(state.layout(3, 300, sizes), { columns: 3, height: 130 });
  assert.equal(state.layout(4, 300, sizes).height, 232);
  assert.equal(state.layout(99, 300, sizes).height, state.layout(9, 300, sizes).height);
  assert.equal(state.layout(5, 10, sizes).columns, 1);
});

test("names without their folders", () => {
  assert.equal(state.baseName("a/b/c.png"), "c.png");
  assert.equal(state.baseName("c.png"), "c.png");
});

test("pictures of ComfyUI's folders are named as Load Image names them", () => {
  const of = (subfolder, type) => state.nameOf({ filename: "c.png", subfolder, type });
  assert.equal(of("", "input"), "c.png");
  assert.equal(of("a\\b", "input"), "a/b/c.png");
  assert.equal(of("a", "output"), "a/c.png [output]");
});

const near = (found, wanted) =>
  found.forEach((value, n) => assert.ok(Math.abs(value - wanted[n]) < 1e-9, `${found}`));

test("the crop box stays inside while it moves", () => {
  near(moved([0.2, 0.2, 0.5, 0.5], 0.1, -0.1), [0.3, 0.1, 0.5, 0.5]);
  near(moved([0.2, 0.2, 0.5, 0.5], 9, -9), [0.5, 0, 0.5, 0.5]);
});

test("sides and corners of the crop box", () => {
  near(resized(WHOLE, "nw", 0.25, 0.5), [0.25, 0.5, 0.75, 0.5]);
  near(resized(WHOLE, "se", -0.25, -0.5), [0, 0, 0.75, 0.5]);
  near(resized([0.2, 0.2, 0.5, 0.5], "e", 9, 9), [0.2, 0.2, 0.8, 0.5]);
  near(resized([0.2, 0.2, 0.5, 0.5], "s", 0, -9), [0.2, 0.2, 0.5, 0.02]);
});

test("a square box stays square and inside, in a wide picture", () => {
  const ratio = 2; // twice as wide as high
  near(squared(WHOLE, ratio), [0.25, 0, 0.5, 1]);
  for (const handle of ["n", "s", "w", "e", "nw", "ne", "sw", "se"]) {
    for (const [dx, dy] of [[0.1, 0.1], [-0.1, -0.1], [0.9, 0.9], [-0.9, -0.9], [0.3, -0.2]]) {
      const [x, y, w, h] = resized([0.3, 0.3, 0.2, 0.4], handle, dx, dy, ratio);
      assert.ok(Math.abs(w * ratio - h) < 1e-9, `${handle} ${dx} ${dy}: ${w} ${h}`);
      assert.ok(x >= -1e-9 && y >= -1e-9 && x + w <= 1 + 1e-9 && y + h <= 1 + 1e-9);
      assert.ok(w > 0);
    }
  }
});
