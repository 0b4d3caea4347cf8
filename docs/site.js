// A box that scrolls sideways can be reached by the keyboard, and scrolled by its arrow keys, while it is too narrow.
function reach() {
  for (const box of document.querySelectorAll(".md-content :is(pre > code, .md-typeset__scrollwrap, .output, p:has(> img))")) {
    const table = box.querySelector(".output");
    if (box.scrollWidth > box.clientWidth && !table) box.tabIndex = 0;
    else box.removeAttribute("tabindex");
  }
  // The theme's copy buttons stand in landmarks without names, which are told apart by nothing.
  for (const nav of document.querySelectorAll("nav.md-code__nav")) nav.setAttribute("role", "none");
}
// Tables get their boxes from the theme's script, after this one.
addEventListener("load", () => setTimeout(reach, 100));
addEventListener("resize", () => setTimeout(reach, 100));
// An option or a name with dashes is not broken behind a dash, unless it is long: "--" at a line's end says nothing.
for (const code of document.querySelectorAll(".md-content :not(pre) > code")) {
  if (code.childElementCount) continue;
  code.replaceChildren(...code.textContent.split(/([\w-]*-[\w-]*)/).map((part, place) => {
    if (place % 2 === 0 || part.length > 24) return part;
    const word = document.createElement("span");
    word.className = "whole";
    word.textContent = part;
    return word;
  }));
}
// The title of a page that shows a file breaks behind a slash.
for (const title of document.querySelectorAll(".md-content h1")) {
  if (title.firstChild?.nodeType !== Node.TEXT_NODE || !title.firstChild.data.includes("/")) continue;
  const parts = title.firstChild.data.split(/(?<=\/)/);
  title.firstChild.replaceWith(...parts.flatMap(part => [part, document.createElement("wbr")]));
}
