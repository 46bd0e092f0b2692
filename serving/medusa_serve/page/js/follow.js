/** Keep a growing text in sight, until the reader scrolls away from its end. */

const NEAR = 80; // pixels from the end that still count as the end

/**
 * @param {HTMLElement} scroller what scrolls
 * @param {HTMLElement} content what grows in it
 * @returns {() => void} follow the end from now on
 */
export function followEnd(scroller, content) {
  let isFollowing = false;
  let lastTop = 0;
  const onScroll = () => {
    const isNear = scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight < NEAR;
    if (isNear) isFollowing = true;
    else if (scroller.scrollTop < lastTop) isFollowing = false; // only a reader scrolls up; else the text has grown meanwhile
    lastTop = scroller.scrollTop;
  };
  scroller.addEventListener("scroll", onScroll, { passive: true });
  new ResizeObserver(() => {
    if (isFollowing) scroller.scrollTop = scroller.scrollHeight;
  }).observe(content);
  return () => {
    isFollowing = true;
  };
}
