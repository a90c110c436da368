// Requests of the gallery to ComfyUI's server: uploads, folders, existing files, thumbnails.

import { api } from "../../../scripts/api.js";

export const ACCEPTED = ".png,.jpg,.jpeg,.webp,.bmp,.gif,.tif,.tiff,.avif";
const UPLOAD_FOLDER = "easyref";
const ENDINGS = new Set(ACCEPTED.split(","));

/** Whether a local file can be a reference, by its extension or else its MIME type. */
export function isPicture(file) {
  const dot = file.name.lastIndexOf(".");
  if (dot > 0) return ENDINGS.has(file.name.slice(dot).toLowerCase());
  return file.type.startsWith("image/");
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
  const body = JSON.stringify({ files });
  const headers = { "Content-Type": "application/json" };
  return (await asked("/easyref/stamps", { method: "POST", body, headers })).stamps;
}

/** URL of a thumbnail, with EXIF rotation applied. */
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
