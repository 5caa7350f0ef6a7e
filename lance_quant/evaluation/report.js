const viewer = document.getElementById("viewer");
const names = viewer.querySelector(".names"), image = viewer.querySelector("img"), video = viewer.querySelector("video");
let links = [], at = 0;

function show(index) {
  at = (index + links.length) % links.length;
  const link = links[at], thumbnail = link.querySelector("img").src, clip = /\.mp4$/i.test(link.href);
  [...names.children].forEach((button, place) => button.setAttribute("aria-pressed", place === at));
  image.hidden = clip;
  video.hidden = !clip;
  if (clip) {
    const time = video.currentTime;
    video.onerror = () => { video.hidden = true; image.hidden = false; image.src = thumbnail; };
    video.onloadedmetadata = () => { video.currentTime = time; };
    video.src = link.href;
  } else {
    video.removeAttribute("src");
    image.onerror = () => { image.onerror = null; image.src = thumbnail; };
    image.onload = () => image.classList.toggle("small", image.naturalWidth < 400);
    image.src = link.href;
  }
}

document.querySelectorAll(".shot a").forEach(link => link.addEventListener("click", event => {
  event.preventDefault();
  links = [...link.closest("article").querySelectorAll(".shot a")];
  names.replaceChildren(...links.map((other, index) => {
    const button = document.createElement("button");
    button.textContent = other.dataset.name;
    button.onclick = () => show(index);
    return button;
  }));
  show(links.indexOf(link));
  viewer.showModal();
}));
image.onclick = () => show(at + 1);
viewer.querySelector(".close").onclick = () => viewer.close();
viewer.onclose = () => video.pause();
viewer.addEventListener("keydown", event => {
  if (event.target === video) return;
  if (event.key === "ArrowRight") show(at + 1);
  if (event.key === "ArrowLeft") show(at - 1);
});
