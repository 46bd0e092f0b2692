/** Keep a growing text in sight, as long as the reader has not scrolled away from its end. */

const NEAR = 80; // pixels from the end that still count as the end

/**
 * @param {HTMLElement} scroller what scrolls
 * @param {HTMLElement} content what grows in it
 */
export function followEnd(scroller, content) {
  let isAtEnd = false;
  scroller.addEventListener(
    "scroll",
    () => {
      isAtEnd = scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight < NEAR;
    },
    { passive: true },
  );
  new ResizeObserver(() => {
    if (isAtEnd) scroller.scrollTop = scroller.scrollHeight;
  }).observe(content);
}
