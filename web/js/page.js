// Helpers to create elements.

/** Create an element with attributes (`on…` functions become listeners) and children. */
export function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") element.addEventListener(name.slice(2), value);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false && value != null) element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
}

const SHAPES = {
  add: "M8 3v10M3 8h10",
  folder: "M2 4.5h4l1.5 2H14v6.5H2z",
  crop: "M4.5 1v10.5H15M1 4.5h10.5V15",
  remove: "M4 4l8 8M12 4l-8 8",
  missing: "M2 3h12v10H2zM2 13L14 3",
  picture: "M2 3h12v10H2zM2 11l3.5-3.5 3 3 2-2L14 12M10.5 6h.01",
};

/** Create an SVG element with attributes. */
export function makeSvg(tag, attributes = {}, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

/** An SVG icon in the text colour. */
export function icon(name) {
  const attributes = { viewBox: "0 0 16 16", class: "easyref-icon", "aria-hidden": "true" };
  return makeSvg("svg", attributes, makeSvg("path", { d: SHAPES[name] }));
}

/** Show a modal dialog that does not pass keys to the graph. Resolves with the value given to
 * `close(value)`, null if cancelled. `fill(close)` returns the content. */
export function openDialog(title, className, fill) {
  return new Promise((resolve) => {
    const before = document.activeElement;
    let result = null;
    const close = (value = null) => {
      result = value;
      dialog.close();
    };
    const heading = make("h2", { id: "easyref-dialog-title" }, title);
    const dialog = make(
      "dialog",
      {
        class: `easyref-dialog ${className}`,
        "aria-labelledby": heading.id,
        onkeydown: (event) => event.stopPropagation(),
        onkeyup: (event) => event.stopPropagation(),
        onpaste: (event) => event.stopPropagation(),
        onclose: () => {
          dialog.remove();
          if (before?.isConnected) before.focus();
          resolve(result);
        },
      },
      heading,
    );
    dialog.append(...fill(close));
    document.body.append(dialog);
    dialog.showModal();
  });
}
