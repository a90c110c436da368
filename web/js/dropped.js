// What is dropped on the gallery: local files, or a picture that the page itself shows.

const ASSET = "application/x-comfy-asset-info"; // of the page's list of media
const LINK = "text/uri-list";

/** Whether files or something that may be a picture of the page are being dragged. */
export function dragsPictures(event) {
  const types = [...(event.dataTransfer?.types ?? [])];
  return ["Files", ASSET, LINK].some((type) => types.includes(type));
}

/**
 * What was dropped; to be called before the event has passed.
 * @returns {{files: File[], shown: {filename: string, subfolder: string, type: string} | null,
 * link: string | null}} shown: a picture in one of ComfyUI's folders; link: another address.
 */
export function dropped({ dataTransfer }) {
  const files = [...dataTransfer.files];
  const link = firstLink(dataTransfer.getData(LINK));
  const shown = asset(dataTransfer.getData(ASSET)) ?? viewed(link);
  // With a picture of the page, browsers also hand over a file, which they name by themselves.
  return { files: shown ? [] : files, shown, link: shown || files.length ? null : link };
}

/** The URL of a link; null if it is none. */
export function addressOf(link) {
  try {
    return new URL(link, location.href);
  } catch {
    return null;
  }
}

function asset(text) {
  let content;
  try {
    content = JSON.parse(text);
  } catch {
    return null;
  }
  return entry(content?.filename, content?.subfolder, content?.type);
}

/** The picture of an address of ComfyUI's route "view". */
function viewed(link) {
  const url = link && addressOf(link);
  if (!url || url.origin !== location.origin || !url.pathname.endsWith("/view")) return null;
  const query = url.searchParams;
  return entry(query.get("filename"), query.get("subfolder"), query.get("type") ?? "output");
}

function entry(filename, subfolder, type) {
  if (typeof filename !== "string" || !filename) return null;
  if (!["input", "output", "temp"].includes(type)) return null;
  return { filename, subfolder: typeof subfolder === "string" ? subfolder : "", type };
}

function firstLink(text) {
  const lines = text.split("\n").map((line) => line.trim());
  return lines.find((line) => line && !line.startsWith("#")) ?? null;
}
