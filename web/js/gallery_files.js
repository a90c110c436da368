// What the gallery asks ComfyUI's server: uploads, folders, which files are there, thumbnails.

import { api } from "../../../scripts/api.js";

export const ACCEPTED = ".png,.jpg,.jpeg,.webp,.bmp,.gif,.tif,.tiff,.avif";
const UPLOAD_FOLDER = "easyref";
const ENDINGS = new Set(ACCEPTED.split(","));

/** Whether a file of the computer can be a reference, by its name or else its type. */
export function isPicture(file) {
  const dot = file.name.lastIndexOf(".");
  if (dot > 0) return ENDINGS.has(file.name.slice(dot).toLowerCase());
  return file.type.startsWith("image/");
}

/** Put a file into the input folder. @returns its name there; another one where it was taken. */
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

/** Folders of the input folder that hold pictures: [{folder, pictures}]. */
export async function folders() {
  return (await asked("/easyref/folders")).folders;
}

/** Picture files of a folder: {pictures, found}; found counts those beyond the limit too. */
export async function picturesIn(folder) {
  return asked(`/easyref/pictures?folder=${encodeURIComponent(folder)}`);
}

/** For each file what changes when the file does; "" where it is missing. */
export async function stamps(files) {
  const body = JSON.stringify({ files });
  const headers = { "Content-Type": "application/json" };
  return (await asked("/easyref/stamps", { method: "POST", body, headers })).stamps;
}

/** The address of a small upright picture. */
export function thumbnailUrl(file, stamp, side, crop = null) {
  const query = new URLSearchParams({ file, side, v: stamp });
  if (crop) query.set("crop", crop.join(","));
  return api.apiURL(`/easyref/thumbnail?${query}`);
}

async function asked(path, options) {
  const answer = await api.fetchApi(path, options);
  if (answer.ok) return answer.json();
  const { error } = await answer.json().catch(() => ({}));
  throw new Error(error ?? `${answer.status} ${answer.statusText}`);
}
