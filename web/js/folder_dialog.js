// Dialog to choose a folder of ComfyUI's input folder.

import { make, openDialog } from "./page.js";

/**
 * Ask for a folder.
 * @param t the gallery's texts.
 * @param {{folder: string, pictures: number}[]} folders to choose from.
 * @returns {Promise<string | null>} null if cancelled; "" is the input folder itself.
 */
export function askForFolder(t, folders) {
  return openDialog(t("folderHead"), "easyref-folder", (close) => {
    const cancel = make("button", { type: "button", onclick: () => close() }, t("cancel"));
    if (!folders.length) {
      return [
        make("p", {}, t("noFolders")),
        make("div", { class: "easyref-row easyref-end" }, cancel),
      ];
    }
    const choice = make(
      "select",
      { size: Math.min(Math.max(folders.length, 3), 10), autofocus: true },
      ...folders.map(({ folder, pictures }) =>
        make(
          "option",
          { value: folder },
          t("folderEntry", { name: folder || t("input"), count: pictures }),
        ),
      ),
    );
    choice.selectedIndex = 0;
    const form = make(
      "form",
      { method: "dialog" },
      make("label", {}, t("folderLabel"), choice),
      make(
        "div",
        { class: "easyref-row easyref-end" },
        cancel,
        make("button", { type: "submit", class: "easyref-main" }, t("apply")),
      ),
    );
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      close(choice.value);
    });
    choice.addEventListener("dblclick", () => close(choice.value));
    return [form];
  });
}
