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
