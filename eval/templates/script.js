// Paper unfolds nothing: what is folded is opened for it, and closed again.
addEventListener("beforeprint", () => {
  const folded = [...document.querySelectorAll("details:not([open])")];
  folded.forEach((details) => (details.open = true));
  addEventListener("afterprint", () => folded.forEach((details) => (details.open = false)), { once: true });
});

// Shows the lesion nearest to the pointer, in both maps at once.
(() => {
  const panel = document.getElementById("seen");
  const maps = [...document.querySelectorAll(".map svg")];
  if (!panel || !maps.length) return;
  const lesions = JSON.parse(document.getElementById("lesions").textContent);
  const dots = maps.map((map) => [...map.querySelectorAll("circle")]);
  const REACH = 14; // units of the map
  let shown = -1;

  const line = (text, strong) => {
    const element = document.createElement(strong ? "strong" : "div");
    element.textContent = text;
    return element;
  };

  const show = (number) => {
    if (number === shown) return;
    dots.forEach((of) => {
      of[shown]?.classList.remove("here");
      of[number]?.classList.add("here");
    });
    shown = number;
    const lesion = lesions[number];
    const text = document.createElement("div");
    text.append(
      line(lesion.key, true),
      line(`${panel.dataset.group} ${lesion.group}`),
      line(`is ${lesion.label}, called ${lesion.called}`),
      line(`probability of ${panel.dataset.positive} ${lesion.probability.toFixed(3)}`),
    );
    const picture = document.createElement("img");
    picture.alt = lesion.key;
    picture.src = `data:image/jpeg;base64,${lesion.picture}`;
    panel.replaceChildren(...(lesion.picture ? [picture, text] : [text]));
  };

  maps.forEach((map, at) => {
    const find = (event) => {
      const place = new DOMPoint(event.clientX, event.clientY).matrixTransform(map.getScreenCTM().inverse());
      let best = -1;
      let least = REACH ** 2;
      dots[at].forEach((dot, number) => {
        const away = (dot.cx.baseVal.value - place.x) ** 2 + (dot.cy.baseVal.value - place.y) ** 2;
        if (away < least) [best, least] = [number, away];
      });
      if (best >= 0) show(best);
    };
    map.addEventListener("pointermove", find);
    map.addEventListener("pointerdown", find);
  });
})();
