// Requests of the gallery to ComfyUI's server: uploads, folders, existing files, thumbnails.

import { api } from "../../../scripts/api.js";
import { addressOf } from "./dropped.js";

const UPLOAD_FOLDER = "easyref";
const HEAD_BYTES = 512; // as much as the server looks at
const ASKED_AT_ONCE = 500;

/**
 * What files hold, by the server's judgement of how they begin.
 * @param {Blob[]} blobs
 * @returns {Promise<({name: string, readable: boolean} | null)[]>} null where it is unknown.
 */
export async function formats(blobs) {
  const found = [];
  for (let start = 0; start < blobs.length; start += ASKED_AT_ONCE) {
    const heads = await Promise.all(blobs.slice(start, start + ASKED_AT_ONCE).map(head));
    found.push(...(await posted("/easyref/formats", { heads })).formats);
  }
  return found;
}

/** How a file begins, in base64; nothing of what cannot be read, such as a dropped folder. */
async function head(blob) {
  const buffer = await blob.slice(0, HEAD_BYTES).arrayBuffer().catch(() => new ArrayBuffer(0));
  return btoa(String.fromCharCode(...new Uint8Array(buffer)));
}

/** A picture that the page shows from one of ComfyUI's folders, as a file. */
export async function fetchShown({ filename, subfolder, type }) {
  const query = new URLSearchParams({ filename, subfolder, type });
  return asFile(await api.fetchApi(`/view?${query}`), filename);
}

/** A picture of this page by its address; null for one of another site. */
export async function fetchLink(link) {
  const url = addressOf(link);
  if (url?.origin !== location.origin) return null;
  return asFile(await fetch(url), decodeURIComponent(url.pathname.split("/").at(-1)) || "picture");
}

async function asFile(answer, name) {
  if (!answer.ok) throw new Error(`${answer.status} ${answer.statusText}`);
  const blob = await answer.blob();
  return new File([blob], name, { type: blob.type });
}

/** Upload a file to the input folder. @returns its name there; renamed if the name is taken. */
export async function upload(file) {
  const body = new FormData();
  body.append("image", file, file.name);
  body.append("subfolder", UPLOAD_FOLDER);
  body.append("type", "input");
  const answer = await api.fetchApi("/upload/image", { method: "POST", body });
  if (!answer.ok) throw new Error(`${answer.status} ${answer.statusText}`);
  const { name, subfolder } = await answer.json();
  return subfolder ? `${subfolder.replaceAll("\\", "/")}/${name}` : name;
}

/** Folders in the input folder that contain pictures: [{folder, pictures}]. */
export async function folders() {
  return (await asked("/easyref/folders")).folders;
}

/** Picture files of a folder: {pictures, found}; `found` also counts those beyond the limit. */
export async function picturesIn(folder) {
  return asked(`/easyref/pictures?folder=${encodeURIComponent(folder)}`);
}

/** A stamp per file that changes with its content; "" if the file is missing. */
export async function stamps(files) {
  return (await posted("/easyref/stamps", { files })).stamps;
}

/** URL of a thumbnail, with EXIF rotation applied. */
export function thumbnailUrl(file, stamp, side, crop = null) {
  const query = new URLSearchParams({ file, side, v: stamp });
  if (crop) query.set("crop", crop.join(","));
  return api.apiURL(`/easyref/thumbnail?${query}`);
}

function posted(path, content) {
  const headers = { "Content-Type": "application/json" };
  return asked(path, { method: "POST", body: JSON.stringify(content), headers });
}

async function asked(path, options) {
  const answer = await api.fetchApi(path, options);
  if (answer.ok) return answer.json();
  const { error } = await answer.json().catch(() => ({}));
  throw new Error(error ?? `${answer.status} ${answer.statusText}`);
}
